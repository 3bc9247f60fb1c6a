#include "tactic/attention.h"

#include <string>

#include "core/backend.h"
#include "tactic/error.h"

namespace tactic {

struct Attention::Impl {
  DecodeOptions options;
  std::unique_ptr<BackendRun> backend;
  int32_t num_threads = 0;
};

namespace {

void check_rows(const char* name, const RowsView& rows, int32_t dim, const KvView& kv) {
  const bool quantized = rows.dtype == DType::kQ8_0 || rows.dtype == DType::kQ4_0;
  const int32_t multiple = quantized ? 32 : 16;
  if (dim < multiple || dim > 1024 || dim % multiple != 0) {
    throw Error(std::string(name) + " head_dim (" + std::to_string(dim) + ") must be a multiple of " +
                std::to_string(multiple) + " up to 1024 for " + dtype_name(rows.dtype));
  }
  if (kv.kv_len > 0 && rows.data == nullptr) throw Error(std::string(name) + " data must not be null when kv_len is " + std::to_string(kv.kv_len));
  if (rows.page_table != nullptr && rows.page_tokens < 1) {
    throw Error(std::string(name) + " page_tokens (" + std::to_string(rows.page_tokens) + ") must be at least 1");
  }
}

void check_query(const DecodeQuery& query) {
  const KvView& kv = query.kv;
  if (kv.num_kv_heads < 1) throw Error("num_kv_heads (" + std::to_string(kv.num_kv_heads) + ") must be at least 1");
  if (query.num_q_heads < 1 || query.num_q_heads % kv.num_kv_heads != 0) {
    throw Error("num_q_heads (" + std::to_string(query.num_q_heads) + ") must be a multiple of num_kv_heads (" + std::to_string(kv.num_kv_heads) + ")");
  }
  if (kv.kv_len < 0 || kv.kv_len > INT32_MAX) throw Error("kv_len (" + std::to_string(kv.kv_len) + ") must be in 0..2^31-1");
  check_rows("K", kv.k, kv.head_dim, kv);
  check_rows("V", kv.v, kv.v_head_dim, kv);
  if (query.q == nullptr || query.out == nullptr) throw Error("q and out must not be null");
  if (query.index != nullptr) {
    const KvShape& shape = query.index->shape();
    if (shape.num_kv_heads != kv.num_kv_heads || shape.head_dim != kv.head_dim || shape.v_head_dim != kv.v_head_dim) {
      throw Error("the index is for " + std::to_string(shape.num_kv_heads) + " KV heads of " + std::to_string(shape.head_dim) + " and " +
                  std::to_string(shape.v_head_dim) + ", the query has " + std::to_string(kv.num_kv_heads) + " of " +
                  std::to_string(kv.head_dim) + " and " + std::to_string(kv.v_head_dim));
    }
  }
}

}  // namespace

Attention::Attention(const DecodeOptions& options, Backend backend, int32_t num_threads) : impl_(std::make_unique<Impl>()) {
  set_options(options);
  impl_->backend = backend == Backend::kCpu ? make_cpu_run() : make_reference_run();
  impl_->num_threads = num_threads;
}

Attention::~Attention() = default;
Attention::Attention(Attention&&) noexcept = default;
Attention& Attention::operator=(Attention&&) noexcept = default;

void Attention::run(std::span<const DecodeQuery> queries, StepStats* stats) {
  for (const DecodeQuery& query : queries) check_query(query);
  impl_->backend->run(queries, impl_->options, impl_->num_threads, stats);
}

void Attention::set_options(const DecodeOptions& options) {
  validate(options);
  impl_->options = options;
}

const DecodeOptions& Attention::options() const { return impl_->options; }
void Attention::set_num_threads(int32_t num_threads) { impl_->num_threads = num_threads; }

}  // namespace tactic
