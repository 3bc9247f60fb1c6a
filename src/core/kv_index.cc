// Which rows are clustered, and when. The clustering itself is the backend's.
#include "tactic/kv_index.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <string>

#include "core/backend.h"
#include "core/check.h"
#include "core/index_state.h"
#include "tactic/error.h"

namespace tactic {

namespace {

// Calls fn(word_index, mask) for the words that cover rows [begin, end).
template <class Fn>
void for_words(int64_t begin, int64_t end, Fn fn) {
  while (begin < end) {
    const int64_t word = begin >> 6;
    const int64_t stop = std::min(end, (word + 1) * 64);
    uint64_t mask = ~uint64_t{0} << (begin & 63);
    if ((stop & 63) != 0) mask &= (uint64_t{1} << (stop & 63)) - 1;
    fn(word, mask);
    begin = stop;
  }
}

}  // namespace

void RowBits::set_range(int64_t begin, int64_t end) {
  for_words(begin, end, [&](int64_t w, uint64_t mask) { words_[static_cast<size_t>(w)] |= mask; });
}

void RowBits::reset_range(int64_t begin, int64_t end) {
  end = std::min(end, capacity());
  for_words(begin, end, [&](int64_t w, uint64_t mask) { words_[static_cast<size_t>(w)] &= ~mask; });
}

int64_t RowBits::count_range(int64_t begin, int64_t end) const {
  int64_t count = 0;
  for_words(begin, std::min(end, capacity()),
            [&](int64_t w, uint64_t mask) { count += std::popcount(words_[static_cast<size_t>(w)] & mask); });
  return count;
}

int64_t RowBits::find(bool value, int64_t begin, int64_t end) const {
  while (begin < end) {
    const uint64_t bits = (value ? word(begin >> 6) : ~word(begin >> 6)) >> (begin & 63);
    if (bits != 0) return std::min(end, begin + std::countr_zero(bits));
    begin = (begin | 63) + 1;
  }
  return end;
}

int64_t RowBits::end_below(int64_t end) const {
  for (; end > 0; end = (end - 1) & ~int64_t{63}) {
    const int drop = static_cast<int>(-end & 63);  // bits of the last word that lie past the end
    if (const uint64_t bits = word((end - 1) >> 6) << drop; bits != 0) return end - std::countl_zero(bits);
  }
  return 0;
}

std::vector<int32_t> RowFilter::first_visible(int32_t count) const {
  std::vector<int32_t> rows;
  for (int64_t w = 0; w * 64 < kv_len; ++w) {
    for (uint64_t bits = visible_word(w); bits != 0; bits &= bits - 1) {
      if (static_cast<int32_t>(rows.size()) >= count) return rows;
      rows.push_back(static_cast<int32_t>(w * 64 + std::countr_zero(bits)));
    }
  }
  return rows;
}

int64_t RowFilter::count_visible(int64_t begin, int64_t end) const {
  int64_t count = 0;
  for_words(begin, end, [&](int64_t w, uint64_t mask) { count += std::popcount(visible_word(w) & mask); });
  return count;
}

int64_t RowFilter::count_indexed(int64_t begin, int64_t end) const {
  int64_t count = 0;
  for_words(begin, end,
            [&](int64_t w, uint64_t mask) { count += std::popcount(visible_word(w) & indexed->word(w) & mask); });
  return count;
}

KvIndex::KvIndex(const IndexOptions& options, const KvShape& shape) : state_(std::make_unique<IndexState>()) {
  validate(options);
  KvView kv;  // without rows
  kv.num_kv_heads = shape.num_kv_heads;
  kv.head_dim = shape.head_dim;
  kv.v_head_dim = shape.v_head_dim;
  check_view(kv);
  state_->options = resolved(options, shape.head_dim, shape.v_head_dim);
  state_->shape = shape;
  state_->calibration.resize(static_cast<size_t>(shape.num_kv_heads));
}

KvIndex::~KvIndex() = default;
KvIndex::KvIndex(KvIndex&&) noexcept = default;
KvIndex& KvIndex::operator=(KvIndex&&) noexcept = default;

void KvIndex::write(int64_t row_begin, int64_t count) {
  check_row_range(row_begin, count);
  if (count == 0) return;
  IndexState& s = *state_;
  const int64_t end = row_begin + count;
  if (end > s.written.capacity()) {
    const int64_t rows = std::max(end, s.written.capacity() * 2);
    s.indexed.resize(rows);  // first: it must reach as far as `written` even when memory runs out in between
    s.written.resize(rows);
  }
  s.written.set_range(row_begin, end);
  s.indexed.reset_range(row_begin, end);
  s.rows_end = std::max(s.rows_end, end);
  s.settled = std::min(s.settled, row_begin);
}

namespace {

// What steps have learned of rows that are gone.
void forget_rows(IndexState& s, int64_t begin, int64_t end) {
  const auto gone = [&](int32_t row) { return row >= begin && row < end; };
  for (Calibration& known : s.calibration) {
    std::erase_if(known.heavy, gone);
    std::erase_if(known.suspects, gone);
    std::erase_if(known.expected, gone);
  }
}

}  // namespace

void KvIndex::truncate(int64_t kv_len) {
  if (kv_len < 0) throw Error("kv_len (" + std::to_string(kv_len) + ") must be at least 0");
  IndexState& s = *state_;
  if (kv_len >= s.rows_end) return;
  forget_rows(s, kv_len, s.rows_end);
  s.settled = std::min(s.settled, kv_len);
  s.written.reset_range(kv_len, s.rows_end);
  s.indexed.reset_range(kv_len, s.rows_end);
  s.rows_end = s.written.end_below(kv_len);
  std::erase_if(s.segments, [&](const Segment& segment) { return segment.row_begin >= kv_len; });
}

void KvIndex::remove(int64_t row_begin, int64_t count) {
  check_row_range(row_begin, count);
  IndexState& s = *state_;
  const int64_t end = std::min(row_begin + count, s.rows_end);
  if (end <= row_begin) return;
  forget_rows(s, row_begin, end);
  s.settled = std::min(s.settled, row_begin);
  s.written.reset_range(row_begin, end);
  s.indexed.reset_range(row_begin, end);
  std::erase_if(s.segments, [&](const Segment& segment) {
    const int64_t segment_end = segment.row_begin + segment.num_rows;
    if (segment.row_begin >= end || segment_end <= row_begin) return false;
    s.indexed.reset_range(segment.row_begin, segment_end);
    s.settled = std::min(s.settled, segment.row_begin);
    return true;
  });
  s.rows_end = s.written.end_below(s.rows_end);
}

namespace {

constexpr size_t kSuspects =
    64;  // per KV head; induction finds new rows all the time, which must not push out the lasting ones at once

}  // namespace

void found_heavy(IndexState& index, int32_t head, int32_t row) {
  Calibration& known = index.calibration[static_cast<size_t>(head)];
  if (std::binary_search(known.heavy.begin(), known.heavy.end(), row)) return;
  const auto suspect = std::find(known.suspects.begin(), known.suspects.end(), row);
  if (suspect == known.suspects.end()) {
    if (known.suspects.size() == kSuspects) known.suspects.erase(known.suspects.begin());
    known.suspects.push_back(row);
    return;
  }
  const auto limit = static_cast<size_t>(2 * index.options.outlier_fraction * static_cast<float>(index.rows_end));
  if (known.heavy.size() < limit)
    known.heavy.insert(std::lower_bound(known.heavy.begin(), known.heavy.end(), row), row);
  known.suspects.erase(suspect);
}

void KvIndex::forget_learned() { state_->calibration.assign(state_->calibration.size(), {}); }

void KvIndex::clear() {
  IndexState& s = *state_;
  s.segments.clear();
  s.written.clear();
  s.indexed.clear();
  s.rows_end = s.settled = 0;
  forget_learned();
}

namespace {

struct Due {
  int64_t row_begin;
  int32_t num_rows;
  bool provisional;
  double cost;  // in full segments
};

int64_t sinks_in(const IndexState& s, int64_t begin, int64_t end) {
  return std::clamp<int64_t>(s.options.sink_tokens - begin, 0, end - begin);
}

// Rows of [begin, end) that a segment could hold but the index does not.
int64_t unindexed_in(const IndexState& s, int64_t begin, int64_t end) {
  return end - begin - sinks_in(s, begin, end) - s.indexed.count_range(begin, end);
}

const Segment* segment_at(const IndexState& s, int64_t row_begin, int32_t num_rows) {
  const auto at = std::lower_bound(s.segments.begin(), s.segments.end(), row_begin,
                                   [](const Segment& segment, int64_t row) { return segment.row_begin < row; });
  return at != s.segments.end() && at->row_begin == row_begin && at->num_rows == num_rows ? &*at : nullptr;
}

bool is_written(const IndexState& s, int64_t begin, int64_t end) {
  return s.written.count_range(begin, end) == end - begin;
}

// Incremental clustering: a block of segment_tokens rows is one segment once all its rows are written, before that each
// full part of provisional_tokens rows is a segment of its own. What was rewritten is built anew when enough has
// changed. `left_out`: something waits for a larger budget. Blocks that are settled are not looked at again, so that
// what a step costs does not grow with the context.
std::vector<Due> due_incremental(IndexState& s, double max_segments, bool& left_out) {
  const IndexOptions& o = s.options;
  const int64_t block_rows = o.segment_tokens, part_rows = o.provisional_tokens;
  const auto cost = [](int64_t rows, int32_t cluster_rows) {  // of k-means: rows times clusters
    return static_cast<double>(rows) * static_cast<double>(rows) / cluster_rows;
  };
  const double part_cost = cost(part_rows, o.provisional_cluster_tokens) / cost(block_rows, o.cluster_tokens);
  std::vector<Due> due;
  double planned = 0;
  for (int64_t begin = s.settled / block_rows * block_rows; begin < s.rows_end; begin += block_rows) {
    const int64_t end = begin + block_rows;
    const int64_t unindexed = unindexed_in(s, begin, end);
    if (is_written(s, begin, end)) {
      const bool exists = segment_at(s, begin, o.segment_tokens) != nullptr;
      if (exists && unindexed < part_rows) continue;
      if (max_segments < 0 || planned + 1 <= max_segments) {
        due.push_back({begin, o.segment_tokens, false, 1});
        planned += 1;
        continue;
      }
      left_out = true;
      if (exists) continue;  // stays readable; its rewritten rows are read exactly
    } else if (segment_at(s, begin, o.segment_tokens) != nullptr && unindexed < block_rows / 2) {
      continue;  // cut short by truncate(): what is left of the segment is still good
    }
    for (int64_t part = begin; part < std::min(end, s.rows_end); part += part_rows) {
      const int64_t missing = unindexed_in(s, part, part + part_rows);
      const bool exists = segment_at(s, part, o.provisional_tokens) != nullptr;
      if (!is_written(s, part, part + part_rows) || missing == 0 || (exists && missing < part_rows / 4)) continue;
      due.push_back({part, o.provisional_tokens, true, part_cost});
    }
  }
  if (due.empty() && !left_out) s.settled = s.rows_end;
  return due;
}

// The paper's way: all rows at once, and again when segment_tokens rows have come since. Removed rows part segments.
std::vector<Due> due_whole(const IndexState& s) {
  constexpr int64_t kLeastRows = 64;  // fewer between two holes are read exactly
  std::vector<Due> due;
  int64_t unindexed = 0;
  for (int64_t begin = s.written.find(true, 0, s.rows_end), end; begin < s.rows_end;
       begin = s.written.find(true, end, s.rows_end)) {
    end = std::min(begin + kMaxSegmentRows, s.written.find(false, begin, s.rows_end));
    if (end - begin < kLeastRows) continue;
    due.push_back({begin, static_cast<int32_t>(end - begin), false, 0});
    unindexed += unindexed_in(s, begin, end);
  }
  if (!s.segments.empty() && unindexed < s.options.segment_tokens) due.clear();
  return due;
}

Segment build_segment(const IndexState& s, const KvView& kv, const Due& due) {
  const IndexOptions& o = s.options;
  Segment segment;
  segment.row_begin = due.row_begin;
  segment.num_rows = due.num_rows;
  segment.provisional = due.provisional;
  const auto sinks = static_cast<int32_t>(sinks_in(s, due.row_begin, due.row_begin + due.num_rows));
  const int32_t mean_size = due.provisional ? o.provisional_cluster_tokens : o.cluster_tokens;
  segment.num_sinks = sinks;
  segment.num_clusters = std::max(1, (due.num_rows - sinks + mean_size - 1) / mean_size);
  segment.heads.resize(static_cast<size_t>(kv.num_kv_heads));
  segment.row_checks.resize(static_cast<size_t>(kv.num_kv_heads) * static_cast<size_t>(due.num_rows));
  const size_t k_bytes = row_bytes(kv.k.dtype, kv.head_dim), v_bytes = row_bytes(kv.v.dtype, kv.v_head_dim);
  std::vector<ClusterTask> tasks(segment.heads.size());
  for (int32_t head = 0; head < kv.num_kv_heads; ++head) {
    ClusterTask& task = tasks[static_cast<size_t>(head)];
    task.kv = kv;
    task.head = head;
    task.row_begin = due.row_begin;
    task.num_rows = due.num_rows;
    task.first_row = sinks;
    task.num_clusters = segment.num_clusters;
    task.iterations = o.iterations;
    task.num_outliers = outliers_of(o.outlier_fraction, due.num_rows, segment.num_clusters);
    task.seed = o.seed + static_cast<uint64_t>(due.row_begin) * 31 + static_cast<uint64_t>(head);
  }
  cpu::cluster_heads(tasks, s.num_threads, segment.heads);
  for (int32_t head = 0; head < kv.num_kv_heads; ++head) {
    uint8_t* checks = segment.row_checks.data() + static_cast<size_t>(head) * static_cast<size_t>(due.num_rows);
    for (int32_t i = sinks; i < due.num_rows; ++i) {
      const int64_t row = due.row_begin + i;
      checks[i] = static_cast<uint8_t>(check_row(kv.k.row(head, row), k_bytes, row) |
                                       (check_row(kv.v.row(head, row), v_bytes, row) << 4));
    }
  }
  return segment;
}

void put_segment(IndexState& s, Segment segment) {
  const int64_t begin = segment.row_begin, end = begin + segment.num_rows;
  // The only thing here that can fail: no bit may name a segment that is not there.
  s.segments.reserve(s.segments.size() + 1);
  std::erase_if(s.segments, [&](const Segment& old) {
    if (old.row_begin >= end || old.row_begin + old.num_rows <= begin) return false;
    s.indexed.reset_range(old.row_begin, old.row_begin + old.num_rows);
    return true;
  });
  s.indexed.set_range(begin + sinks_in(s, begin, end), end);
  const auto at =
      std::find_if(s.segments.begin(), s.segments.end(), [&](const Segment& other) { return other.row_begin > begin; });
  s.segments.insert(at, std::move(segment));
}

void check_view_of(const IndexState& s, const KvView& kv) {
  check_view(kv);
  const auto fail = [](const char* name, int64_t value, int64_t expected) {
    throw Error(std::string(name) + " (" + std::to_string(value) + ") must be the index's " + std::to_string(expected));
  };
  if (kv.num_kv_heads != s.shape.num_kv_heads) fail("num_kv_heads", kv.num_kv_heads, s.shape.num_kv_heads);
  if (kv.head_dim != s.shape.head_dim) fail("head_dim", kv.head_dim, s.shape.head_dim);
  if (kv.v_head_dim != s.shape.v_head_dim) fail("v_head_dim", kv.v_head_dim, s.shape.v_head_dim);
  if (kv.kv_len < s.rows_end) {
    throw Error("kv_len (" + std::to_string(kv.kv_len) + ") must cover the " + std::to_string(s.rows_end) +
                " rows written");
  }
  check_strides(kv);
}

}  // namespace

bool KvIndex::maintain(const KvView& kv, double max_segments) {
  IndexState& s = *state_;
  check_view_of(s, kv);
  if (std::isnan(max_segments)) throw Error("max_segments (nan) must be a number");
  const bool whole = s.options.clustering == Clustering::kWhole;
  double spent = 0;
  while (true) {  // a new segment can push out an old one and make its other parts due
    bool left_out = false;
    const std::vector<Due> due =
        whole ? due_whole(s) : due_incremental(s, max_segments < 0 ? -1 : max_segments - spent, left_out);
    if (due.empty()) return left_out && max_segments >= 1;
    for (const Due& item : due) {
      if (max_segments >= 0 && spent + item.cost > max_segments) return item.cost <= max_segments;
      spent += item.cost;
      put_segment(s, build_segment(s, kv, item));
    }
  }
}

namespace {

constexpr int64_t kFewChanged = 8;  // rows of a segment, rewritten one by one

}  // namespace

int64_t KvIndex::verify(const KvView& kv) { return verify(kv, 0, state_->rows_end); }

int64_t KvIndex::verify(const KvView& kv, int64_t row_begin, int64_t count) {
  IndexState& s = *state_;
  check_row_range(row_begin, count);
  check_view_of(s, kv);
  const size_t k_bytes = row_bytes(kv.k.dtype, kv.head_dim), v_bytes = row_bytes(kv.v.dtype, kv.v_head_dim);
  int64_t changed = 0;
  for (const Segment& segment : s.segments) {
    const int64_t before = changed, end = std::min(row_begin + count, segment.row_begin + segment.num_rows);
    for (int64_t row = std::max(row_begin, segment.row_begin); row < end; ++row) {
      if (!s.indexed.test(row)) continue;
      for (int32_t head = 0; head < kv.num_kv_heads; ++head) {
        const uint8_t check = static_cast<uint8_t>(check_row(kv.k.row(head, row), k_bytes, row) |
                                                   (check_row(kv.v.row(head, row), v_bytes, row) << 4));
        if (check == segment.row_checks[static_cast<size_t>(head) * static_cast<size_t>(segment.num_rows) +
                                        static_cast<size_t>(row - segment.row_begin)])
          continue;
        s.indexed.reset(row);
        ++changed;
        break;
      }
    }
    // A check looks at eight bytes of a row. Where a few dimensions of all rows changed (a shift of positions under a
    // rotary embedding of some of them), most rows pass: the segment's clusters are of no more use.
    if (changed - before > std::max<int64_t>(kFewChanged, segment.num_rows / 32))
      s.indexed.reset_range(segment.row_begin, segment.row_begin + segment.num_rows);
    if (changed > before) s.settled = std::min(s.settled, segment.row_begin);
  }
  return changed;
}

uint64_t KvIndex::written_word(int64_t word) const { return word < 0 ? 0 : state_->written.word(word); }
uint64_t KvIndex::indexed_word(int64_t word) const { return word < 0 ? 0 : state_->indexed.word(word); }
int64_t KvIndex::rows_written() const { return state_->written.count_range(0, state_->rows_end); }
int64_t KvIndex::rows_indexed() const { return state_->indexed.count_range(0, state_->rows_end); }

int64_t KvIndex::num_clusters() const {
  int64_t total = 0;
  for (const Segment& segment : state_->segments) total += segment.num_clusters;
  return total;
}

double KvIndex::mean_spread(int32_t head) const {
  if (head < 0 || head >= state_->shape.num_kv_heads)
    throw Error("head (" + std::to_string(head) + ") must be in 0.." + std::to_string(state_->shape.num_kv_heads - 1));
  double sum = 0, rows = 0;
  for (const Segment& segment : state_->segments) {
    const HeadClusters& clusters = segment.heads.at(static_cast<size_t>(head));
    for (size_t c = 0; c < clusters.sizes.size(); ++c) {
      sum += static_cast<double>(clusters.spreads[c]) * clusters.sizes[c];
      rows += clusters.sizes[c];
    }
  }
  return rows > 0 ? sum / rows : 0;
}

size_t KvIndex::memory_bytes() const {
  const IndexState& s = *state_;
  size_t bytes = sizeof(IndexState) + static_cast<size_t>(s.written.num_words() + s.indexed.num_words()) * 8;
  for (const Segment& segment : s.segments) {
    bytes += sizeof(Segment) + segment.row_checks.capacity();
    for (const HeadClusters& h : segment.heads) {
      bytes += sizeof(HeadClusters) + h.mean.capacity() * 4 + h.residuals.capacity() + h.scales.capacity() * 4 +
               h.spreads.capacity() * 4 + h.sizes.capacity() * 2 + h.members.capacity() * 2 +
               h.not_finite.capacity() * 2;
    }
  }
  return bytes;
}

void KvIndex::set_num_threads(int32_t num_threads) {
  check_threads(num_threads);
  state_->num_threads = num_threads;
}

const IndexOptions& KvIndex::options() const { return state_->options; }
const KvShape& KvIndex::shape() const { return state_->shape; }

}  // namespace tactic
