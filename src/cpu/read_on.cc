// read_on: clusters are read whole until every head has the mass that is promised (docs/method.md, verified mass).
#include "core/read_on.h"

#include "cpu/task.h"

namespace tactic::cpu {

void reach_mass(Task& task, float target_mass) {
  const SelectParams params{task.group_size, task.q_norms2.data(), task.exact_state.data(), task.beta, 1};
  bool read = false;
  while (!task.not_finite) {
    const NextClusters next = read_on(task.clusters, params, task.readings, measure(task, true, false), target_mass);
    if (next.read.empty()) break;
    for (const int32_t c : next.read) task.readings[static_cast<size_t>(c)] = Reading::kWhole;
    for (const int32_t c : next.silent) task.readings[static_cast<size_t>(c)] = Reading::kWhole;
    task.silenced = true;
    read_whole(task, next.read);
    read = true;
  }
  if (read) task.masses = measure(task, false, false);
}

}  // namespace tactic::cpu
