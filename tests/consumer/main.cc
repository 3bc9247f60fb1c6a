// One decode step over 4096 random rows, sparse against dense.
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "tactic/attention.h"

int main() {
  constexpr int kRows = 4096, kDim = 64, kHeads = 2;
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  std::vector<float> k(kRows * kHeads * kDim), v(k.size()), q(kHeads * kDim), out(q.size()), exact(q.size());
  for (auto* values : {&k, &v, &q}) {
    for (float& x : *values) x = normal(random);
  }
  tactic::KvView kv;
  kv.k = {k.data(), tactic::DType::kF32, kHeads * kDim * 4, kDim * 4};
  kv.v = {v.data(), tactic::DType::kF32, kHeads * kDim * 4, kDim * 4};
  kv.num_kv_heads = kHeads;
  kv.head_dim = kv.v_head_dim = kDim;
  kv.kv_len = kRows;
  tactic::KvIndex index({}, {.num_kv_heads = kHeads, .head_dim = kDim, .v_head_dim = kDim});
  index.write(0, kRows);
  index.maintain(kv);
  tactic::DecodeQuery query;
  query.q = q.data();
  query.q_head_stride = query.out_head_stride = kDim;
  query.num_q_heads = kHeads;
  query.sm_scale = 0.125f;
  query.kv = kv;
  query.index = &index;
  query.out = out.data();
  tactic::StepStats stats;
  tactic::Attention({.target_error = 0.02f}).run({&query, 1}, &stats);
  query.out = exact.data();
  tactic::Attention({.select = tactic::Select::kDense}).run({&query, 1});
  double error = 0;  // values have variance 1, so this is in units of a value
  for (size_t i = 0; i < out.size(); ++i) error += (out[i] - exact[i]) * (out[i] - exact[i]);
  error = std::sqrt(error / static_cast<double>(out.size()));
  std::printf("read fraction %.3f, error %.4f\n", stats.read_fraction(), error);
  return stats.read_fraction() < 1 && error < 0.05 ? 0 : 1;
}
