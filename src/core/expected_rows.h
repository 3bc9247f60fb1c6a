// Rows that are expected to be heavy: the first ones of a sequence that does not begin at row 0, its sinks; those that
// earlier steps found so, though their clusters promised little; and those that the step before named, the rows after
// the ones that weighed much then. A head that copies
// attends to the row after the one it attended to last, and the key of that row is like no other in its cluster. They
// are read for certain and leave the selection; what they are expected for is known before the draw,
// so that nothing is biased (docs/method.md, followers).
#pragma once

#include <span>
#include <vector>

#include "core/steps.h"

namespace tactic {

/// Those rows, and the query's `likely` ones, that it reads through the index and that stand in a cluster, ascending.
void expected_rows(const IndexState& index, int32_t head, const RowFilter& filter, std::span<const int32_t> likely,
                   std::vector<int32_t>& out);

/// Takes `rows` (ascending) out of the selection.
void leave_out(const std::vector<int32_t>& rows, HeadSelection& selection);

}  // namespace tactic
