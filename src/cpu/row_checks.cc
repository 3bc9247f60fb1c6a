// row_checks: whether rows are the ones that were clustered.
#include <algorithm>

#include "cpu/task.h"

namespace tactic::cpu {

namespace {

const Segment* find_segment(const IndexState& index, int64_t row) {
  auto at = std::upper_bound(index.segments.begin(), index.segments.end(), row,
                             [](int64_t r, const Segment& segment) { return r < segment.row_begin; });
  return at == index.segments.begin() ? nullptr : &*std::prev(at);
}

}  // namespace

bool rows_unchanged(const Task& task, const RowList& list, int64_t begin, int64_t end) {
  const KvView& kv = task.query->kv;
  const size_t k_bytes = row_bytes(kv.k.dtype, kv.head_dim), v_bytes = row_bytes(kv.v.dtype, kv.v_head_dim);
  const IndexState& index = task.query->index->state();
  const Segment* segment = nullptr;
  constexpr int64_t kBlock = 32;
  const uint8_t* stored[kBlock];
  uint32_t difference = 0;
  for (; begin < end; begin += kBlock) {
    const int32_t* rows = list.tokens.data() + begin;
    const int64_t count = std::min(kBlock, end - begin);
    for (int64_t i = 0; i < count; ++i) {  // the check values lie anywhere in memory
      if (segment == nullptr || rows[i] < segment->row_begin || rows[i] >= segment->row_begin + segment->num_rows)
        segment = find_segment(index, rows[i]);
      stored[i] = segment->row_checks.data() + int64_t{task.head} * segment->num_rows + (rows[i] - segment->row_begin);
      __builtin_prefetch(stored[i]);
    }
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t k = check_row(kv.k.row(task.head, rows[i]), k_bytes, rows[i]);
      const uint32_t v = check_row(kv.v.row(task.head, rows[i]), v_bytes, rows[i]);
      difference |= (k | v << 4) ^ *stored[i];
    }
  }
  return difference == 0;
}

}  // namespace tactic::cpu
