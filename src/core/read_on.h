// read_on: the rest of a step that promises a mass. It knows what it has read and what the drawn rows say of the rest,
// and names the clusters to read next. Plain arithmetic over a few hundred clusters, so every backend uses this one.
#pragma once

#include <span>
#include <vector>

#include "core/steps.h"

namespace tactic {

inline constexpr double kNormal95 = 1.96;  // standard errors either way

/// How many standard errors a mass must lie above its target to count as reached. Successes at 0.9 against it:
/// docs/method.md, verified mass.
inline constexpr double kSureness = 2.5;

/// What a query head knows of itself.
struct HeadMass {
  double mass = 1;       // estimated share of the rows read with certainty
  double std_error = 0;  // of that
  double freedom = 1;    // degrees of freedom behind std_error
  double lse = 0;        // natural log of the estimated sum of exp(score)
};

/// The end of an interval for the mass: `z` standard errors of a normal variable down (z > 0) or up (z < 0).
double mass_bound(const HeadMass& head, double z);

/// Clusters, ascending.
struct NextClusters {
  std::vector<int32_t> read;    // to be read whole next
  std::vector<int32_t> silent;  // refined ones that rank among those: they would be read whole whatever was drawn
};

/// Nothing when every head of the group has `target_mass`, or nothing is left. Those heads that fall short share out
/// the rest they measured over the clusters not read whole, in proportion to the estimates, and clusters are taken by
/// falling share per row until all would have the target. Draws of refined clusters that rank among those taken must
/// not speak for the rest any more either: of clusters of that rank, those that drew little would be left out and those
/// that drew much kept (docs/method.md, verified mass).
/// `readings`: [num_clusters]. `masses`: [group_size], as the draws of the drawn clusters say alone: a heavy draw whose
/// cluster was read whole says nothing of the rest any more, and much of its scatter is its own.
NextClusters read_on(const ClusterScores& scores, const SelectParams& params, std::span<const Reading> readings,
                     std::span<const HeadMass> masses, double target_mass);

/// Half the variance of a cluster's scores, s^2 = spread * |q|^2; beyond s = sqrt(2 ln n) it grows linearly in s, as n
/// members cannot average more than their maximum.
double spread_growth(double s2, double size);

}  // namespace tactic
