// How many rows a fitted curve believes to hold a target mass: the paper's a / x + b and the curves it was chosen over.
#pragma once

#include <cstdint>
#include <span>

namespace tactic::eval {

enum class Curve : uint8_t {
  kReciprocal,      // a / x + b: the paper's
  kReciprocalOnly,  // a / x, least squares over the two windows
  kLinear,          // a x + b
  kExponential,     // a exp(b x)
  kQuadratic,       // a x^2 + b x + c, through the end of the exact peak as well
};
inline constexpr Curve kCurves[] = {Curve::kReciprocal, Curve::kReciprocalOnly, Curve::kLinear, Curve::kExponential,
                                    Curve::kQuadratic};
const char* curve_name(Curve curve);

/// weights: [n] exp(score) up to a common factor, in the order of the clusters. Only the first 2% and two windows of 1%
/// around 10% and 60% are looked at, as select_fit does (arXiv 2502.12216, section 4.3); the curve stands for the rest,
/// cut off below 0. `certain`: the weight of rows that are read anyway. Returns the smallest number of rows whose
/// believed mass with theirs reaches target_mass.
int64_t fitted_tokens(std::span<const double> weights, double certain, Curve curve, double target_mass);

}  // namespace tactic::eval
