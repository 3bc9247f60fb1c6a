// Everything a user can set, with defaults that suit every model measured. validate() names what is out of range.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace tactic {

/// How the tokens to read are chosen.
enum class Select : uint8_t {
  kDense,   // all of them: exact attention, f32 accumulation
  kSample,  // threshold sampling of the tail (docs/method.md 3)
  kFit,     // the paper: rank clusters, fit the curve, read up to the target mass (arXiv 2502.12216, section 4)
  kTopK,    // a fixed budget of tokens over ranked clusters (the paper's Tactic-topK)
};

/// When keys are clustered.
enum class Clustering : uint8_t {
  kIncremental,  // small segments as rows come, re-clustered coarser as they fill
  kWhole,        // the paper: everything at once at the first decode step, again when `segment_tokens` rows have come
};

/// What the index keeps. Fixed when a KvIndex is made.
struct IndexOptions {
  Clustering clustering = Clustering::kIncremental;
  int32_t cluster_tokens = 0;  // mean cluster size; larger: smaller index, more tokens read; 0: 9 where a row of K and
                               // one of V have 512 dimensions or more in all, else 16 (docs/method.md)
  int32_t segment_tokens = 2048;     // rows clustered together, at most 65535
  int32_t provisional_tokens = 256;  // rows of the small segments that hold the newest tokens; divides segment_tokens
  int32_t provisional_cluster_tokens = 4;  // their mean cluster size
  int32_t iterations = 4;                  // k-means rounds (10 with Clustering::kWhole in the paper)
  int32_t sink_tokens = 4;                 // first rows, always read
  float outlier_fraction = 0.0025f;  // share of a segment's rows of least key norm, and of least value norm, that are
                                     // a cluster each; no more than a sixteenth of the clusters
  uint64_t seed = 0;

  bool operator==(const IndexOptions&) const = default;
};

/// What a decode step does.
struct DecodeOptions {
  Select select = Select::kSample;
  float target_error =
      0.022f;  // kSample: relative standard error of the attention mass of a head whose rows all weigh alike; heads
               // with few heavy rows err less. tau = 1 / target_error^2, adjusted by what earlier steps measured
  float tau = 0.0f;  // kSample: rows that one unit of weight is worth, in place of target_error; a head whose rows all
                     // weigh alike reads tau of them, others fewer or somewhat more; 0: from target_error
  float refine =
      0.01f;  // kSample: a sampled token that stands for more than this share has its cluster read whole; 1: never
  float target_mass =
      0.0f;  // kFit: share of the attention mass to read; 0: 0.9. kSample: the step measures the mass of the rows
             // read with certainty and reads on until every head surely has this share; 0: any mass will do
  int32_t budget = 1024;   // kTopK: tokens per query head
  float beta = 0.0f;       // kSample: weight of the spread term; 0: calibrated per layer and head from what is read
  bool check_rows = true;  // compare the check value of each row that is read as one of its cluster
  uint64_t seed = 0;
};

/// Throws Error naming the option, its value and the limit.
void validate(const IndexOptions& options);

/// The options with what is left to the shape of K and V filled in, as KvIndex::options shows them.
IndexOptions resolved(const IndexOptions& options, int32_t head_dim, int32_t v_head_dim);
void validate(const DecodeOptions& options);

const char* select_name(Select select);
/// Throws Error when `name` is none of dense, sample, fit, topk.
Select select_from_name(std::string_view name);

}  // namespace tactic
