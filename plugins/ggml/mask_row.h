// A row of an attention mask as bits.
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

#include "ggml.h"

namespace tactic::plugin {

/// The mask rows of the step under way as bits. Every layer shows the same mask, so the last few rows are kept and
/// compared.
struct MaskRow {
  std::vector<ggml_fp16_t> values;
  std::vector<uint64_t> visible;
  std::vector<float> bias;  // filled when other values than 0 and -infinity occur
  int64_t num_visible = 0;

  void set(const ggml_fp16_t* mask, int64_t n_kv) {
    const auto n = static_cast<size_t>(n_kv);
    if (values.size() == n && std::memcmp(values.data(), mask, n * sizeof(ggml_fp16_t)) == 0) return;
    values.assign(mask, mask + n);
    visible.assign((n + 63) / 64, 0);
    bias.clear();
    num_visible = 0;
    bool plain = true;
    for (size_t i = 0; i < n; ++i) {
      const bool zero = (mask[i] & 0x7fff) == 0, hidden = mask[i] == 0xfc00;
      plain = plain && (zero || hidden);
      visible[i / 64] |= static_cast<uint64_t>(!hidden) << (i % 64);
      num_visible += !hidden;
    }
    if (plain) return;
    bias.resize(n);
    for (size_t i = 0; i < n; ++i) bias[i] = ggml_fp16_to_fp32(mask[i]);
  }
  void set_all(int64_t n_kv) {
    values.clear();
    bias.clear();
    num_visible = n_kv;
    visible.assign(static_cast<size_t>((n_kv + 63) / 64), ~uint64_t{0});
    if (n_kv % 64 != 0) visible.back() = (uint64_t{1} << (n_kv % 64)) - 1;
  }
};

}  // namespace tactic::plugin
