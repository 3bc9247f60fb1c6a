// On a GPU: a head that copies is followed from step to step (cuda/followers.cuh).
#include <algorithm>

#include "cuda/device.h"
#include "cuda/layer_index.h"

namespace tactic::test {
namespace {

constexpr int64_t kCopied = 1500;
constexpr int32_t kLen = 6000, kHeads = 2, kGroup = 4;

// What each KV head's next step will read for certain.
std::vector<std::vector<int32_t>> named(const cuda::LayerIndex& index) {
  std::vector<cuda::Followers> all(static_cast<size_t>(kHeads * cuda::kMaxSplits));
  cudaMemcpy(all.data(), index.impl().view.followers, all.size() * sizeof(all[0]), cudaMemcpyDeviceToHost);
  std::vector<std::vector<int32_t>> rows(kHeads);
  for (size_t i = 0; i < all.size(); ++i) {
    std::vector<int32_t>& of_head = rows[i / cuda::kMaxSplits];
    of_head.insert(of_head.end(), all[i].rows, all[i].rows + all[i].count);
  }
  for (std::vector<int32_t>& of_head : rows) std::sort(of_head.begin(), of_head.end());
  return rows;
}

CacheSpec without_topics(DType dtype, int32_t dim) {
  CacheSpec spec = spec_of(dtype, dim, kLen, kHeads);
  spec.topic_scale = 0.001f;  // no cluster tells of its members
  return spec;
}

// Every query head attends to one row, nearly alone.
void look_at(Problem& problem, int64_t row) {
  const auto dim = static_cast<size_t>(problem.cache.spec().head_dim);
  for (int32_t h = 0; h < kHeads * kGroup; ++h) {
    const std::vector<float> key = problem.cache.key(h / kGroup, row);
    double norm2 = 0;
    for (const float x : key) norm2 += double{x} * x;
    const auto scale = static_cast<float>(16.0 / (norm2 * problem.query.sm_scale));
    for (size_t d = 0; d < dim; ++d) problem.q[static_cast<size_t>(h) * dim + d] = scale * key[d];
  }
}

using Rows = std::vector<std::vector<int32_t>>;

TEST(Followers, RowsAfterHeavyOnesAreRead) {
  for (const DType dtype : {DType::kF16, DType::kBF16}) {
    for (const int32_t dim : {64, 128}) {
      SCOPED_TRACE(text(dtype_name(dtype), " d", dim));
      Problem problem(without_topics(dtype, dim), kGroup);
      problem.build_index();
      double worst_followed = 0, worst_not = 0;
      for (uint64_t seed = 1; seed <= 6; ++seed) {
        for (const bool learn : {false, true}) {
          cuda::LayerIndex index({}, {kHeads, dim, dim}, 1, kLen);
          index.upload(0, *problem.index, nullptr);
          const auto step = [&](int64_t row, float tau) {
            look_at(problem, row);
            round_queries(problem);
            DeviceBatch device({&problem}, DeviceLayout::kTokenMajor);
            device.batch.learn = learn;
            Device<cuda::StepRecord> records(kHeads);
            cuda::Decode decode({.tau = tau, .seed = seed}, device.limits);
            decode.run(device.batch, &index, nullptr, records.get());
            const std::vector<float> out = device.out(0);
            problem.run({.select = Select::kDense});
            return std::pair{relative_error(out, problem.out), records.values()[0].tokens_exact};
          };
          const auto [all_error, exact] = step(kCopied, 1e9f);  // everything is read
          EXPECT_LT(all_error, 0.02);
          EXPECT_EQ(named(index), learn ? Rows(kHeads, {kCopied + 1}) : Rows(kHeads));
          const auto [error, exact_then] = step(kCopied + 1, 10);
          EXPECT_EQ(exact_then, exact + learn);
          double& worst = learn ? worst_followed : worst_not;
          worst = std::max(worst, error);
          if (!learn) continue;
          EXPECT_EQ(named(index), Rows(kHeads, {kCopied + 2})) << "the row after a follower";
          // A follower is read once, also where its cluster is read whole.
          EXPECT_LT(step(kCopied + 2, 1e9f).first, 0.02);
          // Changes of the index forget, and only these.
          const Rows followed = named(index);
          EXPECT_FALSE(followed[0].empty());
          index.truncate(0, kLen, nullptr);
          index.build(0, DeviceBatch({&problem}, DeviceLayout::kTokenMajor).batch, kLen, nullptr);
          EXPECT_EQ(named(index), followed);
          index.truncate(0, kLen - 256, nullptr);
          EXPECT_EQ(named(index), Rows(kHeads));
        }
      }
      EXPECT_LT(worst_followed, 0.1);
      EXPECT_GT(worst_not, 0.5) << "the case is too easy";
    }
  }
}

TEST(Followers, RowsOfOtherSegmentsAreNotNamed) {
  Problem problem(without_topics(DType::kF16, 64), kGroup);
  problem.build_index();
  const Segment& first = problem.index->state().segments[0];
  const int64_t end = first.row_begin + first.num_rows;
  for (const int64_t row : {end - 2, end - 1}) {
    cuda::LayerIndex index({}, {kHeads, 64, 64}, 1, kLen);
    index.upload(0, *problem.index, nullptr);
    look_at(problem, row);
    DeviceBatch device({&problem}, DeviceLayout::kTokenMajor);
    device.batch.learn = true;
    cuda::Decode decode({.tau = 1e9f}, device.limits);
    decode.run(device.batch, &index, nullptr);
    EXPECT_EQ(named(index)[0].empty(), row == end - 1) << row;
  }
}

}  // namespace
}  // namespace tactic::test
