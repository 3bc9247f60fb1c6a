// A LayerIndex's memory, as the launchers see it.
#pragma once

#include <vector>

#include "cuda/launch_config.h"

namespace tactic::cuda {

struct LayerIndex::Impl {
  DeviceFacts device;
  IndexOptions options;
  KvShape shape;
  int32_t max_sequences = 0;
  IndexView view;
  std::vector<SequenceState> states;     // the host's copy
  std::vector<HeadCalibration> unknown;  // [num_kv_heads] of a sequence from which nothing was learned yet
  std::byte* memory = nullptr;           // all of the view's arrays
  size_t bytes = 0;
  int32_t* first_changed = nullptr;  // what verify() found

  ~Impl();
};

DeviceFacts device_facts();

}  // namespace tactic::cuda
