#include <charconv>

#include "core/index_state.h"
#include "tactic/error.h"
#include "tactic/kv_view.h"
#include "tactic/options.h"
#include "tactic/stats.h"

namespace tactic {

size_t row_bytes(DType dtype, int64_t elements) {
  const bool blocks = dtype == DType::kQ8_0 || dtype == DType::kQ4_0;
  if (elements < 0 || (blocks && elements % 32 != 0)) {
    throw Error("elements (" + std::to_string(elements) + ") must be at least 0" +
                (blocks ? " and a multiple of 32 for " : " for ") + dtype_name(dtype));
  }
  if (dtype > DType::kF8E4M3) throw Error("dtype (" + std::to_string(static_cast<int>(dtype)) + ") must be in 0..5");
  if (elements > INT32_MAX) throw Error("elements (" + std::to_string(elements) + ") must be at most 2^31-1");
  const auto n = static_cast<size_t>(elements);
  switch (dtype) {
    case DType::kF32: return n * 4;
    case DType::kF16:
    case DType::kBF16: return n * 2;
    case DType::kQ8_0: return n / 32 * 34;
    case DType::kQ4_0: return n / 32 * 18;
    case DType::kF8E4M3: return n;
  }
  return 0;
}

const char* dtype_name(DType dtype) {
  switch (dtype) {
    case DType::kF32: return "f32";
    case DType::kF16: return "f16";
    case DType::kBF16: return "bf16";
    case DType::kQ8_0: return "q8_0";
    case DType::kQ4_0: return "q4_0";
    case DType::kF8E4M3: return "f8_e4m3";
  }
  return "?";
}

const char* dense_reason_name(DenseReason reason) {
  switch (reason) {
    case DenseReason::kNone: return "none";
    case DenseReason::kAsked: return "asked";
    case DenseReason::kNoIndex: return "no index";
    case DenseReason::kMask: return "mask";
    case DenseReason::kRowChanged: return "row changed";
    case DenseReason::kNotFinite: return "not finite";
  }
  return "?";
}

const char* select_name(Select select) {
  switch (select) {
    case Select::kDense: return "dense";
    case Select::kSample: return "sample";
    case Select::kFit: return "fit";
    case Select::kTopK: return "topk";
  }
  return "?";
}

Select select_from_name(std::string_view name) {
  for (Select select : {Select::kDense, Select::kSample, Select::kFit, Select::kTopK}) {
    if (name == select_name(select)) return select;
  }
  throw Error("select=" + std::string(name) + " is none of dense, sample, fit, topk");
}

namespace {

// of: what `limit` ends with in numbers, where it names another option. Nothing is allocated unless it fails.
template <class T>
void require(bool ok, const char* name, T value, const char* limit, const int32_t* of = nullptr) {
  if (ok) return;
  char text[32];
  char* const end = std::to_chars(text, text + sizeof text, value).ptr;  // the digits that tell it from any other
  throw Error(std::string(name) + " (" + std::string(&text[0], end) + ") must be " + limit +
              (of != nullptr ? " (" + std::to_string(*of) + ")" : ""));
}

}  // namespace

void validate(const IndexOptions& o) {
  require(o.clustering <= Clustering::kWhole, "clustering", static_cast<int>(o.clustering), "in 0..1");
  require(o.segment_tokens >= 64 && o.segment_tokens <= kMaxSegmentRows, "segment_tokens", o.segment_tokens,
          "in 64..65535");
  require(o.provisional_tokens >= 16 && o.provisional_tokens <= o.segment_tokens &&
              o.segment_tokens % o.provisional_tokens == 0,
          "provisional_tokens", o.provisional_tokens, "at least 16 and a divisor of segment_tokens", &o.segment_tokens);
  require(o.cluster_tokens >= 0 && o.cluster_tokens <= o.segment_tokens, "cluster_tokens", o.cluster_tokens,
          "in 0..segment_tokens", &o.segment_tokens);
  require(o.provisional_cluster_tokens >= 1 && o.provisional_cluster_tokens <= o.provisional_tokens,
          "provisional_cluster_tokens", o.provisional_cluster_tokens, "in 1..provisional_tokens",
          &o.provisional_tokens);
  require(o.iterations >= 1 && o.iterations <= 100, "iterations", o.iterations, "in 1..100");
  require(o.sink_tokens >= 0 && o.sink_tokens <= 1024, "sink_tokens", o.sink_tokens, "in 0..1024");
  require(o.outlier_fraction >= 0 && o.outlier_fraction <= 0.25f, "outlier_fraction", o.outlier_fraction, "in 0..0.25");
}

IndexOptions resolved(const IndexOptions& options, int32_t head_dim, int32_t v_head_dim) {
  // A cluster's centroid has a byte per dimension, a row of K and V four: the wider the rows, the smaller the clusters
  // that a given share of the cache pays for.
  constexpr int32_t kWide = 512, kClusterTokens = 16, kClusterTokensWide = 9;
  IndexOptions o = options;
  if (o.cluster_tokens == 0)
    o.cluster_tokens = int64_t{head_dim} + v_head_dim >= kWide ? kClusterTokensWide : kClusterTokens;
  return o;
}

void validate(const DecodeOptions& o) {
  require(o.select <= Select::kTopK, "select", static_cast<int>(o.select), "in 0..3");
  require(o.target_error >= 1e-6f && o.target_error <= 1, "target_error", o.target_error, "in 1e-6..1");
  require(o.tau == 0 || (o.tau >= 1 && o.tau <= 1e9f), "tau", o.tau, "0 or in 1..1e9");
  require(o.refine > 0 && o.refine <= 1, "refine", o.refine, "in (0, 1]");
  require(o.target_mass >= 0 && o.target_mass <= 1, "target_mass", o.target_mass, "0 (not set) or up to 1");
  require(o.budget >= 1, "budget", o.budget, "at least 1");
  require(o.beta >= 0 && o.beta <= 10, "beta", o.beta, "0 (calibrated) or up to 10");
}

}  // namespace tactic
