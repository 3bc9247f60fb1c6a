// The seam between the public classes and the implementations: src/cpu and src/reference each define one of these.
#pragma once

#include <memory>
#include <span>

#include "core/steps.h"

namespace tactic {

class BackendRun {
 public:
  virtual ~BackendRun() = default;
  virtual void run(std::span<const DecodeQuery> queries, const DecodeOptions& options, int32_t num_threads,
                   StepStats* stats) = 0;
};

std::unique_ptr<BackendRun> make_cpu_run();
std::unique_ptr<BackendRun> make_reference_run();

namespace cpu {
void cluster(const ClusterTask& task, int32_t num_threads, HeadClusters& out);
}

}  // namespace tactic
