// cluster: k-means over the keys of one segment and KV head. Distances as a matrix product, rows shared among threads;
// sums run in row order, so the result does not depend on the number of threads.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <iterator>
#include <numeric>

#include "core/backend.h"
#include "core/random.h"
#include "cpu/parallel.h"
#include "cpu/steps.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/cluster.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep

#include "cpu/rows-inl.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace tactic::cpu {
namespace HWY_NAMESPACE {

// rows[i, :] as f32.
template <DType kType>
void load_rows(const RowsView& view, int32_t head, int64_t row_begin, int64_t begin, int64_t end, size_t dim,
               float* rows) {
  const RowTag df;
  for (int64_t i = begin; i < end; ++i) {
    const std::byte* row = view.row(head, row_begin + i);
    for (size_t d = 0; d < dim; d += hn::Lanes(df)) {
      hn::StoreU(RowLoader<kType>::load(df, row, d), df, rows + static_cast<size_t>(i - begin) * dim + d);
    }
  }
}

void decode_rows(const RowsView& view, int32_t head, int64_t row_begin, int64_t begin, int64_t end, size_t dim,
                 float* rows) {
  switch (view.dtype) {
    case DType::kF32: return load_rows<DType::kF32>(view, head, row_begin, begin, end, dim, rows);
    case DType::kF16: return load_rows<DType::kF16>(view, head, row_begin, begin, end, dim, rows);
    case DType::kBF16: return load_rows<DType::kBF16>(view, head, row_begin, begin, end, dim, rows);
    case DType::kQ8_0: return load_rows<DType::kQ8_0>(view, head, row_begin, begin, end, dim, rows);
    case DType::kQ4_0: return load_rows<DType::kQ4_0>(view, head, row_begin, begin, end, dim, rows);
    case DType::kF8E4M3: return;  // no view has it
  }
}

float sum_squares(const float* x, size_t dim) {
  const RowTag df;
  RowVec sum = hn::Zero(df);
  for (size_t d = 0; d < dim; d += hn::Lanes(df)) {
    const RowVec v = hn::LoadU(df, x + d);
    sum = hn::MulAdd(v, v, sum);
  }
  return hn::GetLane(hn::SumOfLanes(df, sum));
}

// For rows [begin, end): nearest[i] = argmin_c half_norms[c] - x_i.c, distances[i] = that minimum.
// centroids: [padded / 16, dim, 16]; padded clusters have half_norms = infinity.
void assign_rows(const float* x, int64_t begin, int64_t end, size_t dim, const float* centroids,
                 const float* half_norms, int32_t padded, int32_t* nearest, float* distances) {
  const hn::CappedTag<float, kCentroidBlock> df;
  using V = hn::Vec<decltype(df)>;
  const size_t lanes = hn::Lanes(df);
  const hn::RebindToSigned<decltype(df)> di;
  for (int64_t i = begin; i < end; i += 4) {
    const float* rows[4];
    for (int64_t r = 0; r < 4; ++r) rows[r] = x + static_cast<size_t>(std::min(i + r, end - 1)) * dim;
    V best[4];
    hn::Vec<decltype(di)> best_at[4];
    for (int r = 0; r < 4; ++r) {
      best[r] = hn::Set(df, HUGE_VALF);
      best_at[r] = hn::Zero(di);
    }
    for (int32_t c = 0; c < padded; c += kCentroidBlock) {
      const float* block = centroids + static_cast<size_t>(c) * dim;
      for (size_t part = 0; part < kCentroidBlock; part += 2 * lanes) {
        const bool two = part + lanes < kCentroidBlock;
        const size_t second = two ? part + lanes : part;
        V dots[4][2];
        for (int r = 0; r < 4; ++r) dots[r][0] = dots[r][1] = hn::Zero(df);
        for (size_t d = 0; d < dim; ++d) {
          const V c0 = hn::LoadU(df, block + d * kCentroidBlock + part);
          const V c1 = hn::LoadU(df, block + d * kCentroidBlock + second);
          for (int r = 0; r < 4; ++r) {
            const V xv = hn::Set(df, rows[r][d]);
            dots[r][0] = hn::MulAdd(xv, c0, dots[r][0]);
            dots[r][1] = hn::MulAdd(xv, c1, dots[r][1]);
          }
        }
        for (int half = 0; half < (two ? 2 : 1); ++half) {
          const size_t at = static_cast<size_t>(c) + part + static_cast<size_t>(half) * lanes;
          const V norms = hn::LoadU(df, half_norms + at);
          const auto ids = hn::Iota(di, static_cast<int32_t>(at));
          for (int r = 0; r < 4; ++r) {
            const V distance = hn::Sub(norms, dots[r][half]);
            const auto nearer = hn::Lt(distance, best[r]);
            best[r] = hn::IfThenElse(nearer, distance, best[r]);
            best_at[r] = hn::IfThenElse(hn::RebindMask(di, nearer), ids, best_at[r]);
          }
        }
      }
    }
    for (int64_t r = 0; r < std::min<int64_t>(4, end - i); ++r) {
      float value[kCentroidBlock];
      int32_t id[kCentroidBlock];
      hn::StoreU(best[r], df, value);
      hn::StoreU(best_at[r], di, id);
      size_t winner = 0;
      for (size_t l = 1; l < lanes; ++l) {
        if (value[l] < value[winner] || (value[l] == value[winner] && id[l] < id[winner])) winner = l;
      }
      nearest[i + r] = id[winner];
      distances[i + r] = value[winner];
    }
  }
}

void add_to(float* sum, const float* x, size_t dim) {
  const RowTag df;
  for (size_t d = 0; d < dim; d += hn::Lanes(df)) {
    hn::StoreU(hn::Add(hn::LoadU(df, sum + d), hn::LoadU(df, x + d)), df, sum + d);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace tactic::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace tactic::cpu {

HWY_EXPORT(decode_rows);
HWY_EXPORT(sum_squares);
HWY_EXPORT(assign_rows);
HWY_EXPORT(add_to);

namespace {

struct Norms {
  std::vector<float> k, v;  // squared, per row of the task
};

// What becomes of the task's rows; all ascending.
struct Rows {
  std::vector<uint16_t> clustered, outliers, not_finite;

  Rows(const ClusterTask& task, const Norms& norms) {
    std::vector<uint16_t> finite;
    for (int32_t i = task.first_row; i < task.num_rows; ++i) {
      const bool ok = std::isfinite(norms.k[static_cast<size_t>(i)]) && std::isfinite(norms.v[static_cast<size_t>(i)]);
      (ok ? finite : not_finite).push_back(static_cast<uint16_t>(i));
    }
    const size_t count = std::min<size_t>(static_cast<size_t>(task.num_outliers), finite.size());
    for (const std::vector<float>* norm : {&norms.k, &norms.v}) {
      std::vector<uint16_t> order = finite;
      std::partial_sort(order.begin(), order.begin() + static_cast<std::ptrdiff_t>(count), order.end(),
                        [&](uint16_t a, uint16_t b) { return std::pair((*norm)[a], a) < std::pair((*norm)[b], b); });
      outliers.insert(outliers.end(), order.begin(), order.begin() + static_cast<std::ptrdiff_t>(count));
    }
    std::sort(outliers.begin(), outliers.end());
    outliers.erase(std::unique(outliers.begin(), outliers.end()), outliers.end());
    std::set_difference(finite.begin(), finite.end(), outliers.begin(), outliers.end(), std::back_inserter(clustered));
  }
};

// Centroids as the kernels want them: blocks of 16, dimension-major, and half their squared norms.
struct Centroids {
  size_t dim;
  int32_t num, padded;
  std::vector<float> values, half_norms;

  Centroids(size_t dim_, int32_t num_)
      : dim(dim_),
        num(num_),
        padded(padded_clusters(num_)),
        values(static_cast<size_t>(padded) * dim_, 0.0f),
        half_norms(static_cast<size_t>(padded), HUGE_VALF) {}

  void set(int32_t c, const float* x) {
    float norm = 0;
    float* block = values.data() + static_cast<size_t>(c / kCentroidBlock * kCentroidBlock) * dim + c % kCentroidBlock;
    for (size_t d = 0; d < dim; ++d) {
      block[d * kCentroidBlock] = x[d];
      norm += x[d] * x[d];
    }
    half_norms[static_cast<size_t>(c)] = norm / 2;
  }
  void get(int32_t c, float* x) const {
    const float* block =
        values.data() + static_cast<size_t>(c / kCentroidBlock * kCentroidBlock) * dim + c % kCentroidBlock;
    for (size_t d = 0; d < dim; ++d) x[d] = block[d * kCentroidBlock];
  }
};

// Members of each cluster, ascending: offsets [num + 1] into order.
void group_members(const std::vector<int32_t>& nearest, int32_t num, std::vector<int32_t>& offsets,
                   std::vector<int32_t>& order) {
  offsets.assign(static_cast<size_t>(num) + 1, 0);
  for (const int32_t c : nearest) ++offsets[static_cast<size_t>(c) + 1];
  std::partial_sum(offsets.begin(), offsets.end(), offsets.begin());
  std::vector<int32_t> next(offsets.begin(), offsets.end() - 1);
  order.resize(nearest.size());
  for (size_t i = 0; i < nearest.size(); ++i)
    order[static_cast<size_t>(next[static_cast<size_t>(nearest[i])]++)] = static_cast<int32_t>(i);
}

// Quantizes the centroids and measures the spread around what is stored.
void store_clusters(const Centroids& centroids, const float* x, const std::vector<int32_t>& offsets,
                    const std::vector<int32_t>& order, const std::vector<uint16_t>& task_rows, HeadClusters& out) {
  const size_t dim = centroids.dim;
  const auto padded = static_cast<size_t>(centroids.padded);
  out.residuals.assign(padded * dim, 0);
  out.scales.assign(padded, 0);
  out.spreads.assign(padded, 0);
  out.sizes.assign(padded, 0);
  out.members.resize(order.size());
  std::vector<float> centroid(dim);
  for (int32_t c = 0; c < centroids.num; ++c) {
    const auto begin = static_cast<size_t>(offsets[static_cast<size_t>(c)]),
               end = static_cast<size_t>(offsets[static_cast<size_t>(c) + 1]);
    out.sizes[static_cast<size_t>(c)] = static_cast<uint16_t>(end - begin);
    if (begin == end) continue;
    centroids.get(c, centroid.data());
    float largest = 0;
    for (const float value : centroid) largest = std::max(largest, std::fabs(value));
    const float scale = largest / 127;
    int8_t* block =
        out.residuals.data() + static_cast<size_t>(c / kCentroidBlock * kCentroidBlock) * dim + c % kCentroidBlock;
    for (size_t d = 0; d < dim; ++d) {
      const auto q = static_cast<int8_t>(scale > 0 ? std::lrint(centroid[d] / scale) : 0);
      block[d * kCentroidBlock] = q;
      centroid[d] = scale * static_cast<float>(q);
    }
    double spread = 0;
    for (size_t m = begin; m < end; ++m) {
      const auto row = static_cast<size_t>(order[m]);
      float distance = 0;
      for (size_t d = 0; d < dim; ++d) {
        const float diff = x[row * dim + d] - centroid[d];
        distance += diff * diff;
      }
      spread += distance;
      out.members[m] = task_rows[row];
    }
    out.scales[static_cast<size_t>(c)] = scale;
    out.spreads[static_cast<size_t>(c)] = static_cast<float>(spread / static_cast<double>((end - begin) * dim));
  }
}

}  // namespace

void cluster(const ClusterTask& task, int32_t num_threads, HeadClusters& out) {
  // Pointers taken before Highway knows the processor would ask it anew at every call.
  hwy::ChosenTarget& target = hwy::GetChosenTarget();
  if (!target.IsInitialized()) target.Update(hwy::SupportedTargets());
  const auto decode = HWY_DYNAMIC_DISPATCH(decode_rows);
  const auto squares = HWY_DYNAMIC_DISPATCH(sum_squares);
  const auto nearest_of = HWY_DYNAMIC_DISPATCH(assign_rows);
  const auto add = HWY_DYNAMIC_DISPATCH(add_to);
  const auto dim = static_cast<size_t>(task.kv.head_dim), v_dim = static_cast<size_t>(task.kv.v_head_dim);
  const int64_t n_all = task.num_rows;
  std::vector<float> keys(static_cast<size_t>(n_all) * dim);
  Norms norms{std::vector<float>(static_cast<size_t>(n_all)), std::vector<float>(static_cast<size_t>(n_all))};
  parallel_ranges(num_threads, n_all, 256, [&](int64_t begin, int64_t end) {
    std::vector<float> value(v_dim);
    decode(task.kv.k, task.head, task.row_begin, begin, end, dim, keys.data() + static_cast<size_t>(begin) * dim);
    for (int64_t i = begin; i < end; ++i) {
      decode(task.kv.v, task.head, task.row_begin, i, i + 1, v_dim, value.data());
      norms.k[static_cast<size_t>(i)] = squares(keys.data() + static_cast<size_t>(i) * dim, dim);
      norms.v[static_cast<size_t>(i)] = squares(value.data(), v_dim);
    }
  });

  const Rows rows(task, norms);
  out.not_finite = rows.not_finite;
  const auto n = static_cast<int64_t>(rows.clustered.size());
  const int32_t num_means = task.num_clusters - static_cast<int32_t>(rows.outliers.size());
  std::vector<uint16_t> in_clusters = rows.clustered;
  in_clusters.insert(in_clusters.end(), rows.outliers.begin(), rows.outliers.end());

  out.mean.assign(dim, 0.0f);
  std::vector<double> mean(dim, 0.0);
  for (const uint16_t row : rows.clustered) {
    for (size_t d = 0; d < dim; ++d) mean[d] += keys[row * dim + d];
  }
  for (size_t d = 0; d < dim && n > 0; ++d) out.mean[d] = static_cast<float>(mean[d] / static_cast<double>(n));
  std::vector<float> x(in_clusters.size() * dim);
  for (size_t i = 0; i < in_clusters.size(); ++i) {
    for (size_t d = 0; d < dim; ++d) x[i * dim + d] = keys[in_clusters[i] * dim + d] - out.mean[d];
  }

  Centroids centroids(dim, task.num_clusters);
  for (int32_t c = 0; c < num_means && n > 0; ++c) {
    const double u = uniform(task.seed ^ hash64(static_cast<uint64_t>(c)));
    const auto at = std::min(n - 1, static_cast<int64_t>((c + u) * static_cast<double>(n) / num_means));
    centroids.set(c, x.data() + static_cast<size_t>(at) * dim);
  }

  std::vector<int32_t> nearest(static_cast<size_t>(n), -1), previous, offsets, order;
  std::vector<float> distances(static_cast<size_t>(n));
  const auto assign = [&] {
    parallel_ranges(num_threads, n, 64, [&](int64_t begin, int64_t end) {
      nearest_of(x.data(), begin, end, dim, centroids.values.data(), centroids.half_norms.data(), centroids.padded,
                 nearest.data(), distances.data());
    });
    group_members(nearest, num_means, offsets, order);
  };
  for (int32_t round = 0; round < task.iterations; ++round) {
    previous = nearest;
    assign();
    if (nearest == previous) break;
    parallel_ranges(num_threads, num_means, kCentroidBlock, [&](int64_t begin, int64_t end) {
      std::vector<float> sum(dim);
      for (int64_t c = begin; c < end; ++c) {
        const int32_t first = offsets[static_cast<size_t>(c)], last = offsets[static_cast<size_t>(c) + 1];
        if (first == last) continue;
        std::fill(sum.begin(), sum.end(), 0.0f);
        for (int32_t m = first; m < last; ++m)
          add(sum.data(), x.data() + static_cast<size_t>(order[static_cast<size_t>(m)]) * dim, dim);
        for (float& value : sum) value /= static_cast<float>(last - first);
        centroids.set(static_cast<int32_t>(c), sum.data());
      }
    });
    // An empty cluster starts anew at the row that is farthest from its centroid.
    for (int32_t c = 0; c < num_means && n > 0; ++c) {
      if (offsets[static_cast<size_t>(c)] != offsets[static_cast<size_t>(c) + 1]) continue;
      int64_t farthest = 0;
      const auto distance = [&](int64_t i) {
        return distances[static_cast<size_t>(i)] + squares(x.data() + static_cast<size_t>(i) * dim, dim) / 2;
      };
      float most = -HUGE_VALF;
      for (int64_t i = 0; i < n; ++i) {
        if (distances[static_cast<size_t>(i)] == -HUGE_VALF) continue;  // taken by another empty cluster
        if (const float far = distance(i); far > most) most = far, farthest = i;
      }
      distances[static_cast<size_t>(farthest)] = -HUGE_VALF;
      centroids.set(c, x.data() + static_cast<size_t>(farthest) * dim);
    }
  }
  assign();
  for (size_t i = 0; i < rows.outliers.size(); ++i) {
    nearest.push_back(num_means + static_cast<int32_t>(i));
    centroids.set(nearest.back(), x.data() + (static_cast<size_t>(n) + i) * dim);
  }
  group_members(nearest, task.num_clusters, offsets, order);
  store_clusters(centroids, x.data(), offsets, order, in_clusters, out);
}

void load_row(const RowsView& rows, int32_t head, int64_t row, int64_t count, float* out) {
  HWY_DYNAMIC_DISPATCH(decode_rows)(rows, head, row, 0, 1, static_cast<size_t>(count), out);
}

void cluster_heads(std::span<const ClusterTask> tasks, int32_t num_threads, std::span<HeadClusters> out) {
  const int32_t threads = thread_count(num_threads);
  const auto heads = static_cast<int64_t>(tasks.size());
  if (heads < threads || threads == 1 || omp_in_parallel()) {
    for (size_t i = 0; i < tasks.size(); ++i) cluster(tasks[i], num_threads, out[i]);
    return;
  }
  TeamError error;
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (int64_t i = 0; i < heads; ++i) {
    error.guard([&] { cluster(tasks[static_cast<size_t>(i)], 1, out[static_cast<size_t>(i)]); });
  }
  error.rethrow();
}

}  // namespace tactic::cpu
#endif
