#include "paper/fit.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <vector>

namespace tactic::eval {

namespace {

struct Point {
  double x, y;
};

// Through the windows' means `near` and `far`; `peak` is the end of what is known exactly.
std::function<double(double)> fit(Curve curve, Point peak, Point near, Point far) {
  if (far.y > near.y) return [y = (near.y + far.y) / 2](double) { return y; };  // no curve that falls fits
  switch (curve) {
    case Curve::kReciprocal: {
      const double a = (near.y - far.y) / (1 / near.x - 1 / far.x), b = near.y - a / near.x;
      return [=](double x) { return a / x + b; };
    }
    case Curve::kReciprocalOnly: {
      const double a = (near.y / near.x + far.y / far.x) / (1 / (near.x * near.x) + 1 / (far.x * far.x));
      return [=](double x) { return a / x; };
    }
    case Curve::kLinear: {
      const double a = (far.y - near.y) / (far.x - near.x);
      return [=](double x) { return near.y + a * (x - near.x); };
    }
    case Curve::kExponential: {
      if (!(far.y > 0)) return [=](double x) { return x <= near.x ? near.y : 0.0; };
      const double b = std::log(far.y / near.y) / (far.x - near.x);
      return [=](double x) { return near.y * std::exp(b * (x - near.x)); };
    }
    case Curve::kQuadratic:
      return [=](double x) {
        return peak.y * (x - near.x) * (x - far.x) / ((peak.x - near.x) * (peak.x - far.x)) +
               near.y * (x - peak.x) * (x - far.x) / ((near.x - peak.x) * (near.x - far.x)) +
               far.y * (x - peak.x) * (x - near.x) / ((far.x - peak.x) * (far.x - near.x));
      };
  }
  return {};
}

}  // namespace

const char* curve_name(Curve curve) {
  switch (curve) {
    case Curve::kReciprocal: return "a/x+b";
    case Curve::kReciprocalOnly: return "a/x";
    case Curve::kLinear: return "linear";
    case Curve::kExponential: return "exponential";
    case Curve::kQuadratic: return "quadratic";
  }
  return "";
}

int64_t fitted_tokens(std::span<const double> weights, double certain, Curve curve, double target_mass) {
  const auto n = static_cast<int64_t>(weights.size());
  if (target_mass >= 1) return n;
  const int64_t peak = n < 256 ? n : std::max<int64_t>(16, n / 50), width = std::max<int64_t>(8, n / 100);
  std::vector<double> believed(weights.begin(), weights.end());
  if (peak < n) {
    const auto window = [&](int64_t begin) {
      double sum = 0;
      for (int64_t i = begin; i < begin + width; ++i) sum += weights[static_cast<size_t>(i)];
      return Point{static_cast<double>(begin) + (static_cast<double>(width) + 1) / 2, sum / static_cast<double>(width)};
    };
    const auto y = fit(curve, window(peak - width), window(n / 10 - width / 2), window(n * 6 / 10 - width / 2));
    for (int64_t i = peak; i < n; ++i) believed[static_cast<size_t>(i)] = std::max(0.0, y(static_cast<double>(i + 1)));
  }
  double total = certain, mass = certain;
  for (const double weight : believed) total += weight;
  int64_t count = 0;
  while (count < n && !(mass >= target_mass * total)) mass += believed[static_cast<size_t>(count++)];
  return count;
}

}  // namespace tactic::eval
