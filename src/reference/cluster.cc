// cluster: k-means over the keys of one segment and KV head.
#include <algorithm>
#include <cmath>
#include <limits>

#include "core/random.h"
#include "reference/steps.h"

namespace tactic::reference {

namespace {

using Row = std::vector<double>;

Row decode(const RowsView& rows, int32_t head, int64_t row, int32_t dim) {
  Row x(dim);
  for (int32_t d = 0; d < dim; ++d) x[d] = element(rows.dtype, rows.row(head, row), d);
  return x;
}

double distance2(const Row& a, const Row& b) {
  double sum = 0;
  for (size_t d = 0; d < a.size(); ++d) sum += (a[d] - b[d]) * (a[d] - b[d]);
  return sum;
}

// Marks the `count` rows of least norm, ties by lower row, among those of finite norm.
void mark_least(const Row& norms2, int32_t count, std::vector<bool>& marked) {
  std::vector<size_t> order;
  for (size_t i = 0; i < norms2.size(); ++i) {
    if (std::isfinite(norms2[i])) order.push_back(i);
  }
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return norms2[a] < norms2[b]; });
  for (size_t i = 0; i < order.size() && i < static_cast<size_t>(count); ++i) marked[order[i]] = true;
}

}  // namespace

void cluster(const ClusterTask& task, HeadClusters& out) {
  const int32_t dim = task.kv.head_dim;
  const Row zero_k(dim), zero_v(task.kv.v_head_dim);
  std::vector<Row> keys;
  Row k_norms2, v_norms2;
  std::vector<bool> finite;
  for (int64_t row = task.row_begin + task.first_row; row < task.row_begin + task.num_rows; ++row) {
    keys.push_back(decode(task.kv.k, task.head, row, dim));
    const double k2 = distance2(keys.back(), zero_k),
                 v2 = distance2(decode(task.kv.v, task.head, row, task.kv.v_head_dim), zero_v);
    finite.push_back(std::isfinite(static_cast<float>(k2)) && std::isfinite(static_cast<float>(v2)));
    k_norms2.push_back(finite.back() ? k2 : HUGE_VAL);
    v_norms2.push_back(finite.back() ? v2 : HUGE_VAL);
  }
  std::vector<bool> outlier(keys.size());
  mark_least(k_norms2, task.num_outliers, outlier);
  mark_least(v_norms2, task.num_outliers, outlier);

  out = {};
  std::vector<Row> x, outliers;
  std::vector<uint16_t> rows, outlier_rows;
  Row mean(dim);
  for (size_t i = 0; i < keys.size(); ++i) {
    const auto row = static_cast<uint16_t>(i + task.first_row);
    if (!finite[i]) {
      out.not_finite.push_back(row);
      continue;
    }
    (outlier[i] ? outlier_rows : rows).push_back(row);
    (outlier[i] ? outliers : x).push_back(keys[i]);
    for (int32_t d = 0; d < dim && !outlier[i]; ++d) mean[d] += keys[i][d];
  }
  const size_t n = x.size();
  const auto num = static_cast<int32_t>(task.num_clusters - outliers.size());  // of the means
  for (int32_t d = 0; d < dim; ++d) {
    out.mean.push_back(n == 0 ? 0.0f : static_cast<float>(mean[d] / static_cast<double>(n)));
    for (Row& row : x) row[d] -= out.mean[d];
    for (Row& row : outliers) row[d] -= out.mean[d];
  }

  std::vector<Row> centroids(num, zero_k);
  for (int32_t c = 0; c < num && n > 0; ++c) {
    const double u = uniform(task.seed ^ hash64(static_cast<uint64_t>(c)));
    centroids[c] = x[std::min(n - 1, static_cast<size_t>((c + u) * static_cast<double>(n) / num))];
  }
  std::vector<int32_t> nearest(n, -1);
  Row distances(n);
  const auto assign = [&] {  // whether anything changed
    bool changed = false;
    for (size_t i = 0; i < n; ++i) {
      int32_t best = 0;
      for (int32_t c = 1; c < num; ++c) {
        if (distance2(x[i], centroids[c]) < distance2(x[i], centroids[best])) best = c;
      }
      changed = changed || nearest[i] != best;
      nearest[i] = best;
      distances[i] = distance2(x[i], centroids[best]);
    }
    return changed;
  };
  for (int32_t round = 0; round < task.iterations && assign(); ++round) {
    for (int32_t c = 0; c < num; ++c) {
      Row sum(dim);
      double members = 0;
      for (size_t i = 0; i < n; ++i) {
        if (nearest[i] != c) continue;
        members += 1;
        for (int32_t d = 0; d < dim; ++d) sum[d] += x[i][d];
      }
      if (members > 0) {
        for (int32_t d = 0; d < dim; ++d) centroids[c][d] = sum[d] / members;
      } else if (n > 0) {  // starts anew at the row that is farthest from its centroid, each row used once
        const auto farthest = std::max_element(distances.begin(), distances.end());
        centroids[c] = x[farthest - distances.begin()];
        *farthest = -std::numeric_limits<double>::infinity();
      }
    }
  }
  assign();
  for (size_t i = 0; i < outliers.size(); ++i) {
    nearest.push_back(num + static_cast<int32_t>(i));
    centroids.push_back(outliers[i]);
    x.push_back(outliers[i]);
    rows.push_back(outlier_rows[i]);
  }

  const int32_t padded = padded_clusters(task.num_clusters);
  out.residuals.assign(static_cast<size_t>(padded) * dim, 0);
  out.scales.assign(padded, 0);
  out.spreads.assign(padded, 0);
  out.sizes.assign(padded, 0);
  for (int32_t c = 0; c < task.num_clusters; ++c) {
    Row stored(dim);
    double largest = 0, spread = 0;
    for (const double value : centroids[c]) largest = std::max(largest, std::fabs(value));
    out.sizes[c] = static_cast<uint16_t>(std::count(nearest.begin(), nearest.end(), c));
    if (out.sizes[c] == 0) continue;
    out.scales[c] = static_cast<float>(largest / 127);
    for (int32_t d = 0; d < dim && out.scales[c] > 0; ++d) {
      const auto residual = static_cast<int8_t>(std::lrint(centroids[c][d] / out.scales[c]));
      out.residuals[static_cast<size_t>(c / kCentroidBlock * dim + d) * kCentroidBlock + c % kCentroidBlock] = residual;
      stored[d] = static_cast<double>(out.scales[c]) * residual;
    }
    for (size_t i = 0; i < x.size(); ++i) {
      if (nearest[i] != c) continue;
      spread += distance2(x[i], stored);
      out.members.push_back(rows[i]);
    }
    out.spreads[c] = static_cast<float>(spread / out.sizes[c] / dim);
  }
}

}  // namespace tactic::reference
