// row_checks: whether rows are the ones that were clustered.
#include <algorithm>

#include "reference/steps.h"

namespace tactic::reference {

bool rows_unchanged(const IndexState& index, const KvView& kv, int32_t head, const HeadSelection& selection) {
  const size_t k_bytes = row_bytes(kv.k.dtype, kv.head_dim), v_bytes = row_bytes(kv.v.dtype, kv.v_head_dim);
  return std::all_of(selection.tokens.begin(), selection.tokens.end(), [&](int64_t row) {
    const auto holds = [&](const Segment& s) { return row < s.row_begin + s.num_rows; };
    const Segment& segment = *std::find_if(index.segments.begin(), index.segments.end(), holds);
    return segment.row_checks[static_cast<size_t>(head) * segment.num_rows + row - segment.row_begin] ==
           (check_row(kv.k.row(head, row), k_bytes, row) | check_row(kv.v.row(head, row), v_bytes, row) << 4);
  });
}

}  // namespace tactic::reference
