// Rows that are expected to be heavy: those that earlier steps found so, though their clusters promised little; those
// that the step before named, the rows after the ones that weighed much then (a head that copies attends to the row
// after the one it attended to last, and the key of that row is like no other in its cluster); and the first ones of a
// sequence that does not begin at row 0, its sinks. They are read for certain and leave the selection; what they are
// expected for is known before the draw, so that nothing is biased (docs/method.md, followers, sinks).
#pragma once

#include <span>
#include <vector>

#include "core/steps.h"

namespace tactic {

/// Those rows, and the query's `likely` ones, that it reads through the index and that stand in a cluster, ascending.
void expected_rows(const IndexState& index, int32_t head, const RowFilter& filter, std::span<const int32_t> likely,
                   std::vector<int32_t>& out);

/// The sinks that count when a head's share beside them is taken: the first rows that the query may read.
struct Sinks {
  std::vector<int32_t> rows;      // ascending
  std::vector<int32_t> clusters;  // of those that stand in one, in the numbering over all segments
};
Sinks counted_sinks(const IndexState& index, int32_t head, const RowFilter& filter);

/// Takes `rows` (ascending) out of the selection.
void leave_out(const std::vector<int32_t>& rows, HeadSelection& selection);

}  // namespace tactic
