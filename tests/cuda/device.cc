#include "cuda/device.h"

#include <cuda_fp8.h>

#include <algorithm>
#include <cstring>
#include <numeric>

namespace tactic::test {

namespace {

std::vector<int32_t> lens_of(const std::vector<Problem*>& problems) {
  std::vector<int32_t> lens;
  for (const Problem* problem : problems) lens.push_back(static_cast<int32_t>(problem->cache.spec().kv_len));
  return lens;
}

std::vector<float> queries_of(const std::vector<Problem*>& problems) {
  std::vector<float> q;
  for (const Problem* problem : problems) q.insert(q.end(), problem->q.begin(), problem->q.end());
  return q;
}

int32_t page_tokens_of(DeviceLayout layout) {
  return layout == DeviceLayout::kPages1    ? 1
         : layout == DeviceLayout::kPages16 ? 16
         : layout == DeviceLayout::kPages64 ? 64
                                            : 0;
}

__nv_fp8_storage_t to_f8(float x) { return __nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E4M3); }

}  // namespace

void round_to_f8(Cache& cache, const F8Scales& scales) {
  for (int32_t head = 0; head < cache.spec().num_kv_heads; ++head) {
    for (int64_t row = 0; row < cache.spec().kv_len; ++row) {
      for (const bool values : {false, true}) {
        const float scale = (values ? scales.v : scales.k)[static_cast<size_t>(head)];
        std::vector<float> x = values ? cache.value(head, row) : cache.key(head, row);
        for (float& e : x) {
          const __half_raw half = __nv_cvt_fp8_to_halfraw(to_f8(e / scale), __NV_E4M3);
          e = scale * __half2float(__half(half));
        }
        values ? cache.set_value(head, row, x) : cache.set_key(head, row, x);
      }
    }
  }
}

DeviceBatch::DeviceBatch(const std::vector<Problem*>& problems, DeviceLayout layout, const F8Scales* f8)
    : out_size_(problems[0]->out.size()),
      lens_(lens_of(problems)),
      q_(queries_of(problems)),
      out_(q_.values().size()),
      lse_(problems.size() * problems[0]->lse.size()) {
  const CacheSpec& spec = problems[0]->cache.spec();
  const auto sequences = static_cast<int64_t>(problems.size());
  const std::vector<int32_t> lens = lens_of(problems);
  const int64_t max_len = std::max<int64_t>(1, *std::max_element(lens.begin(), lens.end()));
  const int32_t page_tokens = page_tokens_of(layout);
  const int64_t pages = page_tokens > 0 ? (max_len + page_tokens - 1) / page_tokens : 0;
  std::vector<int32_t> table(static_cast<size_t>(sequences * pages));
  std::iota(table.begin(), table.end(), 0);
  Random random(17);
  for (size_t i = table.size(); i > 1; --i)
    std::swap(table[i - 1], table[static_cast<size_t>(random.below(static_cast<int64_t>(i)))]);
  for (const bool values : {false, true}) {
    const DType dtype = f8 != nullptr ? DType::kF8E4M3 : values ? spec.v_dtype : spec.k_dtype;
    const int64_t align = dtype == DType::kQ8_0 || dtype == DType::kQ4_0 ? 2 : dtype == DType::kF8E4M3 ? 8 : 16;
    const int64_t bytes = (static_cast<int64_t>(row_bytes(dtype, spec.head_dim)) + align - 1) / align * align,
                  heads = spec.num_kv_heads;
    cuda::DeviceRows rows;
    rows.dtype = dtype;
    rows.token_stride_bytes =
        layout == DeviceLayout::kHeadMajor || layout == DeviceLayout::kPages16 ? bytes : heads * bytes;
    rows.head_stride_bytes = layout == DeviceLayout::kHeadMajor ? (max_len + 3) * bytes
                             : layout == DeviceLayout::kPages16 ? page_tokens * bytes
                                                                : bytes;
    rows.sequence_stride_bytes = heads * (max_len + 3) * bytes;
    rows.page_tokens = page_tokens;
    rows.page_stride_bytes = heads * page_tokens * bytes + 2 * align;
    std::vector<std::byte> host(static_cast<size_t>(page_tokens > 0 ? sequences * pages * rows.page_stride_bytes
                                                                    : sequences * rows.sequence_stride_bytes),
                                std::byte{0xFF});
    for (int64_t s = 0; s < sequences; ++s) {
      const KvView view = problems[static_cast<size_t>(s)]->cache.view();
      for (int64_t row = 0; row < lens[static_cast<size_t>(s)]; ++row) {
        for (int32_t head = 0; head < heads; ++head) {
          int64_t at = head * rows.head_stride_bytes;
          if (page_tokens > 0) {
            at += table[static_cast<size_t>(s * pages + row / page_tokens)] * rows.page_stride_bytes +
                  row % page_tokens * rows.token_stride_bytes;
          } else {
            at += s * rows.sequence_stride_bytes + row * rows.token_stride_bytes;
          }
          if (f8 == nullptr) {
            std::memcpy(host.data() + at, (values ? view.v : view.k).row(head, row), row_bytes(dtype, spec.head_dim));
            continue;
          }
          const Cache& cache = problems[static_cast<size_t>(s)]->cache;
          const std::vector<float> x =
              values ? cache.value(static_cast<int32_t>(head), row) : cache.key(static_cast<int32_t>(head), row);
          for (size_t d = 0; d < x.size(); ++d) {
            const float scale = (values ? f8->v : f8->k)[static_cast<size_t>(head)];
            host[static_cast<size_t>(at) + d] = static_cast<std::byte>(to_f8(x[d] / scale));
          }
        }
      }
    }
    rows_.emplace_back(host);
    rows.data = rows_.back().get();
    if (f8 != nullptr) {
      scales_.emplace_back(values ? f8->v : f8->k);
      rows.head_scales = scales_.back().get();
    }
    (values ? batch.v : batch.k) = rows;
  }
  if (page_tokens > 0) {
    tables_.emplace_back(table);
    batch.page_tables = tables_.back().get();
    batch.max_pages = static_cast<int32_t>(pages);
  }
  batch.num_sequences = static_cast<int32_t>(sequences);
  batch.num_kv_heads = spec.num_kv_heads;
  batch.num_q_heads = problems[0]->query.num_q_heads;
  batch.head_dim = spec.head_dim;
  batch.sm_scale = problems[0]->query.sm_scale;
  batch.kv_lens = lens_.get();
  batch.q = q_.get();
  batch.q_dtype = DType::kF32;
  batch.out = out_.get();
  batch.lse = lse_.get();
  batch.layer = problems[0]->query.layer;
  limits = {batch.num_sequences,
            batch.num_q_heads,
            batch.num_kv_heads,
            batch.head_dim,
            static_cast<int32_t>(std::max<int64_t>(max_len, 16384)),
            {}};
}

std::vector<float> DeviceBatch::out(size_t i) const {
  const std::vector<float> all = out_.values();
  return {all.begin() + static_cast<int64_t>(i * out_size_), all.begin() + static_cast<int64_t>((i + 1) * out_size_)};
}

std::vector<float> DeviceBatch::lse(size_t i) const {
  const std::vector<float> all = lse_.values();
  const auto n = static_cast<size_t>(batch.num_q_heads);
  return {all.begin() + static_cast<int64_t>(i * n), all.begin() + static_cast<int64_t>((i + 1) * n)};
}

void DeviceBatch::poison_out() {
  out_.put(std::vector<float>(out_.values().size(), std::nanf("")));
  lse_.put(std::vector<float>(lse_.values().size(), std::nanf("")));
}

double tolerance(DType dtype) { return dtype == DType::kBF16 ? 1e-2 : 1.5e-3; }

CacheSpec spec_of(DType dtype, int32_t dim, int64_t kv_len, int32_t heads) {
  CacheSpec spec;
  spec.k_dtype = spec.v_dtype = dtype;
  spec.head_dim = spec.v_head_dim = dim;
  spec.kv_len = kv_len;
  spec.num_kv_heads = heads;
  return spec;
}

void round_queries(Problem& problem) {
  for (float& x : problem.q) {
    const float big = x * 65537;
    x = big - (big - x);
  }
}

void expect_near(const Problem& expected, const std::vector<float>& out, const std::vector<float>& lse, DType dtype,
                 double noise) {
  EXPECT_LT(relative_error(out, expected.out), tolerance(dtype) + noise);
  for (size_t i = 0; i < lse.size(); ++i) {
    if (lse[i] == expected.lse[i]) continue;  // minus infinity where there are no rows
    EXPECT_NEAR(lse[i], expected.lse[i], 10 * tolerance(dtype) + noise) << "head " << i;
  }
}

ReadMass read_mass(const Problem& problem, const Selection& selection) {
  ReadMass mass;
  const auto dim = static_cast<size_t>(problem.cache.spec().head_dim);
  const size_t heads = problem.lse.size(), group = heads / selection.heads.size();
  for (size_t h = 0; h < heads; ++h) {
    const HeadSelection& rows = selection.heads[h / group];
    for (size_t i = 0; i < rows.tokens.size(); ++i) {
      const std::vector<float> key = problem.cache.key(static_cast<int32_t>(h / group), rows.tokens[i]);
      double score = rows.log_weights[i];
      for (size_t d = 0; d < dim; ++d) score += double{problem.query.sm_scale} * problem.q[h * dim + d] * key[d];
      const double weight = std::exp(score - problem.lse[h]);
      if (rows.log_weights[i] == 0) {
        mass.certain += weight / static_cast<double>(heads);
      } else {
        mass.variance += weight * weight * (1 - std::exp(-rows.log_weights[i])) / static_cast<double>(heads);
      }
    }
  }
  return mass;
}

}  // namespace tactic::test
