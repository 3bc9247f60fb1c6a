// The library as a C interface for decode_bench.py: device pointers come from torch.
#include <cuda_runtime.h>

#include <cstdio>
#include <exception>
#include <string>

#include "tactic/cuda.h"

using namespace tactic;

namespace {

template <class Fn>
int guarded(Fn fn) {
  try {
    fn();
    return 0;
  } catch (const std::exception& e) {
    std::fprintf(stderr, "%s\n", e.what());
    return 1;
  }
}

}  // namespace

extern "C" {

__attribute__((visibility("default"))) int32_t bench_record_bytes() { return sizeof(cuda::StepRecord); }

struct BenchBatch {
  int32_t num_sequences, num_q_heads, num_kv_heads, head_dim, bf16;
  float sm_scale;
  const void *k, *v;
  int64_t sequence_stride_bytes, head_stride_bytes, token_stride_bytes;
  const int32_t* kv_lens;
  const void* q;
  void* out;
  int32_t layer;
  int32_t learn;
};

static cuda::DecodeBatch batch_of(const BenchBatch& b) {
  cuda::DecodeBatch batch;
  batch.num_sequences = b.num_sequences;
  batch.num_q_heads = b.num_q_heads;
  batch.num_kv_heads = b.num_kv_heads;
  batch.head_dim = b.head_dim;
  batch.sm_scale = b.sm_scale;
  const DType dtype = b.bf16 != 0 ? DType::kBF16 : DType::kF16;
  batch.k = {b.k, dtype, b.sequence_stride_bytes, b.head_stride_bytes, b.token_stride_bytes, 0, 0};
  batch.v = {b.v, dtype, b.sequence_stride_bytes, b.head_stride_bytes, b.token_stride_bytes, 0, 0};
  batch.kv_lens = b.kv_lens;
  batch.q = b.q;
  batch.q_dtype = dtype;
  batch.out = b.out;
  batch.layer = b.layer;
  batch.learn = b.learn != 0;
  return batch;
}

__attribute__((visibility("default"))) void* bench_index(int32_t cluster_tokens, float outlier_fraction,
                                                         int32_t num_kv_heads, int32_t head_dim, int32_t sequences,
                                                         int32_t rows) {
  cuda::LayerIndex* index = nullptr;
  IndexOptions options;
  options.cluster_tokens = cluster_tokens;
  options.outlier_fraction = outlier_fraction;
  guarded([&] { index = new cuda::LayerIndex(options, {num_kv_heads, head_dim, head_dim}, sequences, rows); });
  return index;
}
__attribute__((visibility("default"))) int bench_build(void* index, const BenchBatch* batch, int32_t sequence,
                                                       int32_t kv_len, void* stream) {
  return guarded([&] { static_cast<cuda::LayerIndex*>(index)->build(sequence, batch_of(*batch), kv_len, stream); });
}
__attribute__((visibility("default"))) int64_t bench_index_bytes(void* index) {
  return static_cast<int64_t>(static_cast<cuda::LayerIndex*>(index)->memory_bytes());
}
__attribute__((visibility("default"))) void bench_free_index(void* index) {
  delete static_cast<cuda::LayerIndex*>(index);
}

struct BenchOptions {
  const char* select;  // dense, sample, fit or topk
  float tau, refine, target_mass;
  int32_t budget, check_rows, cluster_tokens;
  float outlier_fraction;
};

__attribute__((visibility("default"))) void* bench_decode(const BenchOptions* o, int32_t sequences, int32_t num_q_heads,
                                                          int32_t num_kv_heads, int32_t head_dim, int32_t rows) {
  cuda::Decode* decode = nullptr;
  DecodeOptions options;
  const std::string select = o->select;
  for (const Select one : {Select::kDense, Select::kSample, Select::kFit, Select::kTopK}) {
    if (select == select_name(one)) options.select = one;
  }
  options.tau = o->tau;
  options.refine = o->refine;
  options.target_mass = o->target_mass;
  options.budget = o->budget;
  options.check_rows = o->check_rows != 0;
  IndexOptions index;
  index.cluster_tokens = o->cluster_tokens;
  index.outlier_fraction = o->outlier_fraction;
  guarded([&] { decode = new cuda::Decode(options, {sequences, num_q_heads, num_kv_heads, head_dim, rows, index}); });
  return decode;
}
__attribute__((visibility("default"))) int bench_run(void* decode, void* index, const BenchBatch* batch, void* stream,
                                                     void* records) {
  return guarded([&] {
    static_cast<cuda::Decode*>(decode)->run(batch_of(*batch), static_cast<cuda::LayerIndex*>(index), stream,
                                            static_cast<cuda::StepRecord*>(records));
  });
}
__attribute__((visibility("default"))) void bench_free_decode(void* decode) {
  delete static_cast<cuda::Decode*>(decode);
}

}  // extern "C"
