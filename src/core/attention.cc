#include "tactic/attention.h"

#include <cmath>
#include <string>

#include "core/backend.h"
#include "core/check.h"
#include "tactic/error.h"

namespace tactic {

struct Attention::Impl {
  DecodeOptions options;
  std::unique_ptr<BackendRun> backend;
  int32_t num_threads = 0;
};

void validate(const DecodeQuery& query) {
  const KvView& kv = query.kv;
  check_view(kv);
  if (query.num_q_heads > kMaxHeads)
    throw Error("num_q_heads (" + std::to_string(query.num_q_heads) + ") must be at most " + std::to_string(kMaxHeads));
  if (query.num_q_heads < 1 || query.num_q_heads % kv.num_kv_heads != 0) {
    throw Error("num_q_heads (" + std::to_string(query.num_q_heads) +
                ") must be a positive multiple of num_kv_heads (" + std::to_string(kv.num_kv_heads) + ")");
  }
  if (query.q == nullptr) throw Error("q must not be null");
  if (query.out == nullptr) throw Error("out must not be null");
  const auto check_stride = [&](const char* name, int64_t stride, int32_t dim) {
    if (query.num_q_heads > 1 && stride < dim)
      throw Error(std::string(name) + " (" + std::to_string(stride) + ") must be at least " + std::to_string(dim));
    if (query.num_q_heads > 1 && stride > kMaxTokenStride)
      throw Error(std::string(name) + " (" + std::to_string(stride) + ") must be at most " +
                  std::to_string(kMaxTokenStride));
  };
  if (!std::isfinite(query.sm_scale)) throw Error("sm_scale (" + std::to_string(query.sm_scale) + ") must be finite");
  if (!(query.tau_factor > 0 && query.tau_factor <= 1e6f))
    throw Error("tau_factor (" + std::to_string(query.tau_factor) + ") must be in (0, 1e6]");
  if (query.num_likely_rows < 0 || (query.num_likely_rows > 0 && query.likely_rows == nullptr))
    throw Error("num_likely_rows (" + std::to_string(query.num_likely_rows) + ") must be the number of likely_rows");
  for (int32_t i = 0; i < query.num_likely_rows; ++i) {
    const int32_t row = query.likely_rows[i], before = i > 0 ? query.likely_rows[i - 1] : -1;
    if (row <= before)
      throw Error("likely_rows must ascend from 0: " + std::to_string(row) + " follows " + std::to_string(before));
  }
  check_stride("q_head_stride", query.q_head_stride, kv.head_dim);
  check_stride("out_head_stride", query.out_head_stride, kv.v_head_dim);
  check_strides(kv);
  if (query.index != nullptr) {
    const KvShape& shape = query.index->shape();
    if (shape.num_kv_heads != kv.num_kv_heads || shape.head_dim != kv.head_dim || shape.v_head_dim != kv.v_head_dim) {
      throw Error("the index is for " + std::to_string(shape.num_kv_heads) + " KV heads of " +
                  std::to_string(shape.head_dim) + " and " + std::to_string(shape.v_head_dim) + ", the query has " +
                  std::to_string(kv.num_kv_heads) + " of " + std::to_string(kv.head_dim) + " and " +
                  std::to_string(kv.v_head_dim));
    }
  }
}

Attention::Attention(const DecodeOptions& options, Backend backend, int32_t num_threads)
    : impl_(std::make_unique<Impl>()) {
  set_options(options);
  if (backend > Backend::kReference)
    throw Error("backend (" + std::to_string(static_cast<int>(backend)) + ") must be in 0..1");
  impl_->backend = backend == Backend::kCpu ? make_cpu_run() : make_reference_run();
  set_num_threads(num_threads);
}

Attention::~Attention() = default;
Attention::Attention(Attention&&) noexcept = default;
Attention& Attention::operator=(Attention&&) noexcept = default;

void Attention::run(std::span<const DecodeQuery> queries, StepStats* stats) {
  for (const DecodeQuery& query : queries) validate(query);
  impl_->backend->run(queries, impl_->options, impl_->num_threads, stats);
}

void Attention::set_options(const DecodeOptions& options) {
  validate(options);
  impl_->options = options;
}

const DecodeOptions& Attention::options() const { return impl_->options; }

void Attention::set_num_threads(int32_t num_threads) {
  check_threads(num_threads);
  impl_->num_threads = num_threads;
}

}  // namespace tactic
