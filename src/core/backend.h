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
/// Clusters the heads of a segment: a head a thread where that keeps every thread busy, so that threads seldom wait for
/// one another (on a machine with other work to do each wait may last a time slice), else one head after another.
void cluster_heads(std::span<const ClusterTask> tasks, int32_t num_threads, std::span<HeadClusters> out);

/// The first `count` elements of a row as f32; a multiple of 16.
void load_row(const RowsView& rows, int32_t head, int64_t row, int64_t count, float* out);
}  // namespace cpu

}  // namespace tactic
