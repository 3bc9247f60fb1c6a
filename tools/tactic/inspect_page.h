// The page of `tactic inspect`: one HTML file with inline drawings, nothing from elsewhere.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace tactic::tool {

/// One KV head of one layer: means over the sparse steps, or as of the last one. NaN: not known.
struct HeadFigures {
  int64_t steps = 0;                                        // sparse ones; without any the rest means nothing
  double clusters = 0, mean_spread = 0, beta = 0, tau = 0;  // last step
  double tokens = 0;                                        // mean rows read
  double exact_tokens = 0;                                  // of those, sinks, recent and expected rows
  double exact_mass = 0;                                    // mean estimated mass of those
  double estimated_mass = 0, least_mass = 0;                // of all rows read with certainty: mean, least
};

struct LayerFigures {
  int64_t layer = 0, stream = 0, kv_len = 0;
  std::vector<HeadFigures> heads;
};

struct StepFigures {
  int64_t kv_len = 0;
  double tokens_per_kv_head = 0, read_fraction = 0, dense_share = 0, milliseconds = 0;
};

struct InspectPage {
  std::string title;
  std::vector<std::pair<std::string, std::string>> facts;  // model, mode, ...
  std::vector<LayerFigures> layers;
  std::vector<StepFigures> steps;
};

std::string render_page(const InspectPage& page);

}  // namespace tactic::tool
