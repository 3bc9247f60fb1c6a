// Random caches of every type and layout, and what tests share. Everything follows from a seed.
#pragma once

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <memory>
#include <sstream>
#include <string>
#include <vector>

#include "core/index_state.h"
#include "core/steps.h"
#include "tactic/attention.h"
#include "tactic/error.h"

namespace tactic::test {

/// All parts as one string.
template <class... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

/// splitmix64; normal() is a sum of four uniforms, near enough.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t next();
  double uniform() { return static_cast<double>(next() >> 11) * 0x1p-53; }
  float normal();
  int64_t below(int64_t n) { return static_cast<int64_t>(uniform() * static_cast<double>(n)); }

 private:
  uint64_t state_;
};

/// How rows lie. All but the first leave gaps, which hold 0xFF bytes: NaN in every float type.
enum class Layout : uint8_t { kTokenMajor, kHeadMajor, kPadded, kPaged };
const char* layout_name(Layout layout);

struct CacheSpec {
  DType k_dtype = DType::kF16, v_dtype = DType::kF16;
  Layout layout = Layout::kTokenMajor;
  int32_t num_kv_heads = 2, head_dim = 64, v_head_dim = 64;
  int64_t kv_len = 0;
  int32_t topics = 24;       // keys lie around so many directions
  float topic_scale = 2.0f;  // length of those, per dimension; keys have noise of 1 around them
  uint64_t seed = 1;
};

/// Owns the rows of one layer.
class Cache {
 public:
  explicit Cache(const CacheSpec& spec);

  KvView view() const;
  const CacheSpec& spec() const { return spec_; }
  std::vector<float> topic(int32_t head, int32_t number) const;  // [head_dim]

  std::vector<float> key(int32_t head, int64_t row) const;  // as stored
  std::vector<float> value(int32_t head, int64_t row) const;
  void set_key(int32_t head, int64_t row, const std::vector<float>& x);
  void set_value(int32_t head, int64_t row, const std::vector<float>& x);
  void poison(int64_t row);  // 0xFF bytes in K and V of every head

 private:
  struct Rows {
    std::vector<std::byte> bytes;
    std::vector<int32_t> pages;
    RowsView view;
  };
  Rows make_rows(DType dtype, int32_t dim) const;
  static std::byte* place(Rows& rows, int32_t head, int64_t row);

  CacheSpec spec_;
  Rows k_, v_;
};

/// Queries near the cache's topics, so that attention is sparse: [num_q_heads, head_dim].
std::vector<float> make_queries(const Cache& cache, int32_t group_size, uint64_t seed, float sharpness = 1.0f);

/// A query over a cache with room for its answer, and an index if asked for.
struct Problem {
  Cache cache;
  int32_t group_size;
  std::vector<float> q, out, lse;
  std::unique_ptr<KvIndex> index;
  DecodeQuery query;

  Problem(const CacheSpec& spec, int32_t group_size, uint64_t seed = 7, float sharpness = 1.0f);
  Problem(Problem&&) = delete;  // the query points into it
  /// Writes all rows and clusters what is due.
  void build_index(const IndexOptions& options = {});
  /// Answers into out and lse.
  StepStats run(const DecodeOptions& options, Backend backend = Backend::kCpu, int32_t num_threads = 1);
};

/// A row becomes a sink: about so many times as heavy as all other visible rows together in every head (as nearly as
/// the group's queries are orthogonal), its value next to nothing. Before build_index().
void make_sink(Problem& problem, float times, int64_t row = 0);

/// An index over rows [0, kv_len) of the cache, built on the CPU.
std::unique_ptr<KvIndex> build_index(const Cache& cache, const IndexOptions& options = {});

/// RowFilter over everything in `cache` that `index` knows.
RowFilter filter_of(const KvIndex& index, int64_t kv_len, const std::vector<uint64_t>* visible = nullptr);

/// A bit per row, each set with this probability.
std::vector<uint64_t> random_bits(int64_t rows, double probability, uint64_t seed);

/// |a - b| / |b|.
double relative_error(const std::vector<float>& a, const std::vector<float>& b);

bool same_bits(const std::vector<float>& a, const std::vector<float>& b);

/// What fn's Error says, or "no error".
template <class Fn>
std::string message_of(Fn fn) {
  try {
    fn();
  } catch (const Error& e) {
    return e.what();
  }
  return "no error";
}

/// The instruction sets of this machine that the library was built for.
std::vector<int64_t> highway_targets();

/// While it lives, every step runs with one instruction set.
class OnTarget {
 public:
  explicit OnTarget(int64_t target);
  ~OnTarget();
};
std::string target_name(int64_t target);

inline constexpr DType kAllTypes[] = {DType::kF32, DType::kF16, DType::kBF16, DType::kQ8_0, DType::kQ4_0};

inline bool fits(DType dtype, int32_t dim) {
  return dim % (dtype == DType::kQ8_0 || dtype == DType::kQ4_0 ? 32 : 16) == 0;
}

}  // namespace tactic::test
