// The data of a KvIndex, and how its steps see it. Backends fill it (cluster) and read it (score, select, attend).
#pragma once

#include <cmath>
#include <cstdint>
#include <memory>
#include <vector>

#include "tactic/kv_index.h"

namespace tactic {

/// Rows of a segment at most: the size of a cluster that holds them all must fit 16 bits.
inline constexpr int32_t kMaxSegmentRows = 65535;

/// Centroids lie in blocks of this many, dimension-major inside a block, so that scoring needs no horizontal sums.
inline constexpr int32_t kCentroidBlock = 16;

inline int32_t padded_clusters(int32_t num_clusters) {
  return (num_clusters + kCentroidBlock - 1) / kCentroidBlock * kCentroidBlock;
}

/// Rows of least key norm, and as many of least value norm, that get a cluster of their own: a share of the rows, but
/// no more than a sixteenth of the clusters, as what they take the others lack.
inline int32_t outliers_of(float fraction, int32_t num_rows, int32_t num_clusters) {
  const auto wanted = static_cast<int32_t>(std::lround(fraction * static_cast<float>(num_rows)));
  return wanted < num_clusters / 16 ? wanted : num_clusters / 16;
}

/// The clusters of one segment and one KV head. The last ones are outliers, one row each.
struct HeadClusters {
  std::vector<float> mean;           // [head_dim] mean key of the segment; centroid = mean + scale * int8 residual
  std::vector<int8_t> residuals;     // [padded / 16, head_dim, 16]
  std::vector<float> scales;         // [padded]
  std::vector<float> spreads;        // [padded] mean squared distance to the stored centroid, per dimension
  std::vector<uint16_t> sizes;       // [padded] members
  std::vector<uint16_t> members;     // rows relative to row_begin, cluster by cluster, ascending inside a cluster
  std::vector<uint16_t> not_finite;  // rows relative to row_begin, ascending; in no cluster, read by every step
};

/// Rows [row_begin, row_begin + num_rows) clustered together. Rows below `sink_tokens` are left out.
struct Segment {
  int64_t row_begin = 0;
  int32_t num_rows = 0;
  int32_t num_clusters = 0;  // per KV head, some may be empty
  int32_t num_sinks = 0;     // first rows that are left out
  bool provisional = false;
  std::vector<HeadClusters> heads;  // [num_kv_heads]
  std::vector<uint8_t> row_checks;  // [num_kv_heads, num_rows] low four bits: check_row of K, high four: of V
};

/// The starting value of beta, and the weight that measured pairs must reach before they outvote it. Pairs of a greater
/// spread term say nothing, as exp of it is beyond f32, and would outweigh all others for good.
inline constexpr double kPriorSlope = 0.75, kPriorWeight = 20, kMaxTerm = 88;

/// Running least squares of the true log mean weight of a cluster against the spread term (docs/method.md,
/// calibration).
struct Calibration {
  double sum_xx = 0, sum_xy = 0;       // x = spread * |q|^2 / 2, y = true log mean weight minus the centroid's score
  double variance_ratio = 1;           // measured over predicted variance of the mass
  std::vector<int32_t> suspects;       // rows found heavy by chance, the latest last
  std::vector<int32_t> heavy;          // rows found so again, ascending: every step reads them for certain
  std::vector<int32_t> expected;       // rows that the next step reads for certain, ascending (core/expected_rows.h)
  std::vector<double> usual_variance;  // [group_size] running mean of the drawn rows' variance relative to their
                                       // squared sum; of another size than the query's group: unknown

  /// usual_variance of query head g, 0: unknown.
  double usual_of(size_t g, size_t group_size) const {
    return usual_variance.size() == group_size ? usual_variance[g] : 0;
  }

  /// The slope, held near kPriorSlope until pairs of total weight kPriorWeight are in.
  float beta() const {
    const double slope = (sum_xy + kPriorWeight * kPriorSlope) / (sum_xx + kPriorWeight);
    return static_cast<float>(slope < 0 ? 0 : slope > 2 ? 2 : slope);
  }
};

/// One bit per row.
class RowBits {
 public:
  void resize(int64_t rows) { words_.resize(static_cast<size_t>((rows + 63) / 64), 0); }
  int64_t capacity() const { return static_cast<int64_t>(words_.size()) * 64; }
  bool test(int64_t row) const {
    return row < capacity() && ((words_[static_cast<size_t>(row >> 6)] >> (row & 63)) & 1) != 0;
  }
  void set(int64_t row) { words_[static_cast<size_t>(row >> 6)] |= uint64_t{1} << (row & 63); }
  void reset(int64_t row) { words_[static_cast<size_t>(row >> 6)] &= ~(uint64_t{1} << (row & 63)); }
  void set_range(int64_t begin, int64_t end);
  void reset_range(int64_t begin, int64_t end);
  int64_t count_range(int64_t begin, int64_t end) const;  // rows past the capacity count as 0
  /// The first row from `begin` on whose bit is `value`, or `end`.
  int64_t find(bool value, int64_t begin, int64_t end) const;
  /// One past the last row below `end` whose bit is set, or 0.
  int64_t end_below(int64_t end) const;
  uint64_t word(int64_t index) const {
    return index < static_cast<int64_t>(words_.size()) ? words_[static_cast<size_t>(index)] : 0;
  }
  int64_t num_words() const { return static_cast<int64_t>(words_.size()); }
  void clear() { words_.clear(); }

 private:
  std::vector<uint64_t> words_;
};

struct IndexState {
  IndexOptions options;
  KvShape shape;
  std::vector<Segment> segments;         // ascending row_begin, disjoint
  RowBits written;                       // the row holds something
  RowBits indexed;                       // the row is in a segment and has not changed since
  int64_t rows_end = 0;                  // one past the last written row
  int64_t settled = 0;                   // nothing is due of the rows before it (incremental clustering)
  std::vector<Calibration> calibration;  // [num_kv_heads]
  int32_t num_threads = 0;               // for clustering; 0: OpenMP's default

  /// Clusters per KV head over all segments, each segment padded to kCentroidBlock. Cluster numbers run over this.
  int32_t total_clusters() const {
    int32_t total = 0;
    for (const Segment& segment : segments) total += padded_clusters(segment.num_clusters);
    return total;
  }
};

/// A row that was heavy although its cluster promised little is always read when that happens again: sinks in
/// mid-context whose keys are long stand in ordinary clusters and draw 5-10% of whole heads for thousands of steps. As
/// many such rows as outliers.
/// `row` must be visible and indexed.
void found_heavy(IndexState& index, int32_t head, int32_t row);

/// Check value of one stored row: a hash of eight bytes whose place depends on the row number, so that a set of rows
/// covers all dimensions. `bytes`: length of the row, at least 8. Four bits: one row slips through in 16 cases, the
/// hundreds that a step reads do not.
inline uint8_t check_row(const std::byte* data, size_t bytes, int64_t row) {
  const uint64_t mix = (static_cast<uint64_t>(row) + 1) * 0x9E3779B97F4A7C15u;
  uint64_t word;
  __builtin_memcpy(&word, data + (((mix >> 32) * (bytes - 7)) >> 32), 8);
  return static_cast<uint8_t>(((word ^ mix) * 0xC2B2AE3D27D4EB4Fu) >> 60);
}

/// Which rows a query may read at all, and which of those through the index.
struct RowFilter {
  const uint64_t* visible = nullptr;  // as in DecodeQuery
  int64_t kv_len = 0;
  const RowBits* indexed = nullptr;

  uint64_t visible_word(int64_t index) const {
    const int64_t left = kv_len - index * 64;
    if (left <= 0) return 0;
    const uint64_t tail = left >= 64 ? ~uint64_t{0} : (uint64_t{1} << left) - 1;
    return visible == nullptr ? tail : visible[index] & tail;
  }
  bool reads_exact(int64_t row) const { return is_visible(row) && !indexed->test(row); }
  bool reads_indexed(int64_t row) const { return is_visible(row) && indexed->test(row); }
  /// The first `count` visible rows, ascending: the sinks of a sequence that need not begin at row 0.
  std::vector<int32_t> first_visible(int32_t count) const;
  bool is_visible(int64_t row) const { return ((visible_word(row >> 6) >> (row & 63)) & 1) != 0; }
  int64_t count_visible(int64_t begin, int64_t end) const;
  int64_t count_indexed(int64_t begin, int64_t end) const;  // visible and in the index
};

}  // namespace tactic
