// On a GPU: a row that steps find heavy twice, though its cluster promised little, is read by every step from then on
// (cuda/followers.cuh).
#include <algorithm>

#include "cuda/device.h"
#include "cuda/layer_index.h"

namespace tactic::test {
namespace {

constexpr int32_t kLen = 8192, kRow = 3001;

std::vector<cuda::HeavyRows> lists_of(const cuda::LayerIndex& index) {
  std::vector<cuda::HeavyRows> lists(cuda::kMaxSplits);
  cudaMemcpy(lists.data(), index.impl().view.heavy, lists.size() * sizeof(lists[0]), cudaMemcpyDeviceToHost);
  return lists;
}
using Rows = std::vector<int32_t>;
// Of the first sequence and head, whichever blocks know of them.
Rows heavy_of(const cuda::LayerIndex& index) {
  Rows rows;
  const std::vector<cuda::HeavyRows> lists = lists_of(index);
  for (int32_t i = 0; i < lists[0].splits; ++i) rows.insert(rows.end(), lists[i].rows, lists[i].rows + lists[i].count);
  std::sort(rows.begin(), rows.end());
  return rows;
}
Rows suspects_of(const cuda::LayerIndex& index) {
  Rows rows;
  const std::vector<cuda::HeavyRows> lists = lists_of(index);
  for (int32_t i = 0; i < lists[0].splits; ++i)
    rows.insert(rows.end(), lists[i].suspects, lists[i].suspects + lists[i].num_suspects);
  std::sort(rows.begin(), rows.end());
  return rows;
}

// One head of which one row has 90% of the weight, whose cluster tells nothing of it: it is drawn now and then.
struct Surprise {
  Problem problem;
  std::vector<float> exact;

  Surprise() : problem(spec(), 1) {
    for (int64_t row = 0; row < kLen; ++row) {
      std::vector<float> key = problem.cache.key(0, row);
      key[0] = row == kRow ? 0.8984375f : 0.0f;
      problem.cache.set_key(0, row, key);
    }
    std::fill(problem.q.begin(), problem.q.end(), 0.0f);
    problem.q[0] = 100;
    problem.query.sm_scale = 0.125f;
    problem.run({.select = Select::kDense}, Backend::kReference);
    exact = problem.out;
  }
  static CacheSpec spec() {
    CacheSpec spec = spec_of(DType::kF16, 64, kLen, 1);
    spec.topic_scale = 0.001f;
    return spec;
  }
};

// Steps of `count` sequences that are all this one; their draws differ from step to step.
struct Steps {
  DeviceBatch device;
  Device<uint64_t> ids;
  Device<cuda::StepRecord> records;
  cuda::Decode decode;
  uint64_t next = 0;

  Steps(Problem& problem, size_t count, const IndexOptions& options = {}, float target_mass = 0)
      : device(std::vector<Problem*>(count, &problem), DeviceLayout::kTokenMajor),
        ids(count),
        records(count),
        decode({.tau = 40, .refine = 0.02f, .target_mass = target_mass, .beta = 1e-3f}, with(options)) {
    device.batch.learn = true;
    device.batch.stream_ids = ids.get();
  }
  const cuda::DecodeLimits& with(const IndexOptions& options) {
    device.limits.index = options;
    return device.limits;
  }
  // Of the first sequence.
  cuda::StepRecord run(const cuda::LayerIndex& index) {
    std::vector<uint64_t> streams(static_cast<size_t>(device.batch.num_sequences));
    for (uint64_t& stream : streams) stream = next++;
    ids.put(streams);
    decode.run(device.batch, &index, nullptr, records.get());
    return records.values()[0];
  }
  // Until its rows are known, or so many steps are done; how many found the row.
  int learn(const cuda::LayerIndex& index, int steps) {
    int found = 0;
    for (int i = 0; i < steps && heavy_of(index).empty(); ++i) found += run(index).clusters_refined > 0;
    return found;
  }
};

TEST(Heavy, RowsFoundTwiceAreReadByEveryStep) {
  Surprise surprise;
  cuda::LayerIndex index({}, {1, 64, 64}, 1, kLen);
  Steps steps(surprise.problem, 1);
  index.build(0, steps.device.batch, kLen, nullptr);
  const int32_t exact = 4;  // sinks; the context is full segments
  int found = 0, missed = 0;
  for (int i = 0; i < 2000 && found < 2; ++i) {
    EXPECT_EQ(heavy_of(index), Rows{});
    const bool finds = steps.run(index).clusters_refined > 0;
    found += finds;
    missed += !finds && relative_error(steps.device.out(0), surprise.exact) > 0.3;
    if (found == 1) {
      EXPECT_EQ(suspects_of(index), Rows{kRow});
    }
  }
  ASSERT_EQ(found, 2);
  EXPECT_GT(missed, 10) << "the case is too easy";
  EXPECT_EQ(heavy_of(index), Rows{kRow});
  EXPECT_EQ(suspects_of(index), Rows{});
  for (int i = 0; i < 100; ++i) {
    const cuda::StepRecord record = steps.run(index);
    EXPECT_EQ(record.tokens_exact, exact + 2) << "it and the row that follows it";
    EXPECT_EQ(record.clusters_refined, 0);
    EXPECT_LT(relative_error(steps.device.out(0), surprise.exact), 0.1);
  }
  EXPECT_EQ(heavy_of(index), Rows{kRow}) << "no row twice";
  // Each row once, also where its cluster is read whole or read on for; steps that do not learn read as ever.
  Steps all(surprise.problem, 1, {}, 1);
  const cuda::StepRecord read = all.run(index);
  EXPECT_EQ(read.tokens_exact + read.tokens_selected + read.tokens_refined, kLen);
  EXPECT_EQ(read.tokens_exact, exact + 2);
  steps.device.batch.learn = false;
  EXPECT_EQ(steps.run(index).tokens_exact, exact);
  EXPECT_EQ(heavy_of(index), Rows{kRow});
}

TEST(Heavy, ChangesOfTheIndexForgetWhatTheyTouch) {
  Surprise surprise;
  Steps steps(surprise.problem, 1);
  const auto learned = [&](int32_t rows) {
    auto index = std::make_unique<cuda::LayerIndex>(IndexOptions{}, KvShape{1, 64, 64}, 1, kLen);
    steps.device.set_lens({rows});
    index->build(0, steps.device.batch, rows, nullptr);
    EXPECT_EQ(steps.learn(*index, 4000), 2);
    EXPECT_EQ(heavy_of(*index), Rows{kRow});
    return index;
  };
  auto index = learned(6400);  // three full segments, a provisional one
  index->truncate(0, 6400, nullptr);
  index->build(0, steps.device.batch, 6400, nullptr);
  index->truncate(0, 6300, nullptr);
  index->build(0, steps.device.batch, kLen, nullptr);
  EXPECT_EQ(heavy_of(*index), Rows{kRow}) << "none of this touches the row";
  steps.device.set_lens({kLen});
  EXPECT_EQ(steps.run(*index).tokens_exact, 4 + 1) << "its follower is forgotten";
  index->truncate(0, kRow, nullptr);
  EXPECT_EQ(heavy_of(*index), Rows{});
  index->build(0, steps.device.batch, kLen, nullptr);
  EXPECT_EQ(steps.run(*index).tokens_exact, 4);
  // The row in a provisional segment, which becomes part of a full one.
  index = learned(3072 + 256);
  index->build(0, steps.device.batch, 4096, nullptr);
  EXPECT_EQ(heavy_of(*index), Rows{});
  index = learned(6400);
  surprise.problem.build_index();
  index->upload(0, *surprise.problem.index, nullptr);
  EXPECT_EQ(heavy_of(*index), Rows{});
  // Suspects too.
  steps.device.set_lens({kLen});
  cuda::LayerIndex other({}, {1, 64, 64}, 1, kLen);
  other.build(0, steps.device.batch, kLen, nullptr);
  for (int i = 0; i < 4000 && suspects_of(other).empty(); ++i) steps.run(other);
  EXPECT_EQ(suspects_of(other), Rows{kRow});
  other.truncate(0, 4096, nullptr);
  EXPECT_EQ(suspects_of(other), Rows{kRow});
  other.truncate(0, 2048, nullptr);
  EXPECT_EQ(suspects_of(other), Rows{});
}

// Steps of other batches have other blocks for a sequence.
TEST(Heavy, StayWhenBlocksChange) {
  Surprise surprise;
  cuda::LayerIndex index({}, {1, 64, 64}, 140, kLen);
  Steps alone(surprise.problem, 1), many(surprise.problem, 140);
  for (int32_t i = 0; i < 140; ++i) index.build(i, many.device.batch, kLen, nullptr);
  EXPECT_EQ(alone.learn(index, 4000), 2);
  const int32_t splits = lists_of(index)[0].splits;
  EXPECT_GT(splits, 1);
  EXPECT_EQ(many.run(index).tokens_exact, 4 + 1);  // followers are forgotten then
  EXPECT_LT(lists_of(index)[0].splits, splits);
  EXPECT_EQ(heavy_of(index), Rows{kRow});
  EXPECT_EQ(many.run(index).tokens_exact, 4 + 2);
  EXPECT_GE(alone.run(index).tokens_exact, 4 + 1);  // a block may still have a follower that it named before
  EXPECT_EQ(lists_of(index)[0].splits, splits);
  EXPECT_EQ(heavy_of(index), Rows{kRow});
}

TEST(Heavy, AsManyAsOutliers) {
  Surprise surprise;
  const IndexOptions options{.outlier_fraction = 0};
  cuda::LayerIndex index(options, {1, 64, 64}, 1, kLen);
  Steps steps(surprise.problem, 1, options);
  index.build(0, steps.device.batch, kLen, nullptr);
  EXPECT_GT(steps.learn(index, 1000), 4);
  EXPECT_EQ(heavy_of(index), Rows{});
}

}  // namespace
}  // namespace tactic::test
