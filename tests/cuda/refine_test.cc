// On a GPU: clusters that are read whole because a row that was drawn from them weighs too much.
#include <algorithm>

#include "core/index_state.h"
#include "cuda/device.h"

namespace tactic::test {
namespace {

// One head whose keys are noise but for their first element, which is all that the query sees: a score is 12.5 times
// it.
template <class First>
void see_first(Problem& problem, First first) {
  for (int64_t row = 0; row < problem.cache.spec().kv_len; ++row) {
    std::vector<float> key = problem.cache.key(0, row);
    key[0] = first(row);
    problem.cache.set_key(0, row, key);
  }
  std::fill(problem.q.begin(), problem.q.end(), 0.0f);
  problem.q[0] = 100;
  problem.query.sm_scale = 0.125f;
}

CacheSpec noise(DType dtype, int64_t kv_len) {
  CacheSpec spec = spec_of(dtype, 64, kv_len, 1);
  spec.topic_scale = 0.001f;
  return spec;
}

// A draw of probability 7.6e-6 stands for 131072 rows, more than f16 can hold.
TEST(Refine, DrawsOfTheLeastProbabilitiesLeaveNumbers) {
  constexpr int64_t kRows = 1 << 19;
  Problem problem(noise(DType::kF16, kRows), 1);
  see_first(problem, [](int64_t row) { return row % 16 == 5 ? 0.48f : 0.0f; });
  DeviceBatch device({&problem}, DeviceLayout::kTokenMajor);
  device.limits.max_rows = kRows;
  cuda::LayerIndex index({}, {1, 64, 64}, 1, kRows);
  index.build(0, device.batch, kRows, nullptr);
  cuda::Decode decode({.tau = 4, .refine = 0.01f, .beta = 1e-3f}, device.limits);
  const Device<cuda::StepRecord> records(1);
  Device<uint64_t> stream_id(1);
  device.batch.stream_ids = stream_id.get();
  int32_t refined = 0;
  for (uint64_t id = 0; id < 40; ++id) {
    stream_id.put({id});
    device.poison_out();
    decode.run(device.batch, &index, nullptr, records.get());
    const cuda::StepRecord record = records.values()[0];
    refined += record.clusters_refined;
    for (const float x : device.out(0)) ASSERT_TRUE(std::isfinite(x)) << "id " << id;
    EXPECT_TRUE(std::isfinite(device.lse(0)[0])) << "id " << id;
    EXPECT_TRUE(std::isfinite(record.mass_std_error)) << "id " << id;
  }
  EXPECT_GT(refined, 0) << "the case is too easy";
}

// A row that holds 90% of the weight and that no cluster tells of is drawn now and then, with a hundredth of certainty.
// What the draw stood for must then go without a trace.
TEST(Refine, WhatADrawStoodForGoesAgain) {
  for (const DType dtype : {DType::kF16, DType::kBF16}) {
    SCOPED_TRACE(dtype_name(dtype));
    Problem problem(noise(dtype, 8192), 1);
    see_first(problem, [](int64_t row) { return row == 3001 ? 0.8984375f : 0.0f; });
    problem.build_index();
    problem.run({.select = Select::kDense}, Backend::kReference);
    DeviceBatch device({&problem}, DeviceLayout::kPages16);
    cuda::LayerIndex index({}, {1, 64, 64}, 1, 8192);
    index.upload(0, *problem.index, nullptr);
    cuda::Decode decode({.tau = 40, .refine = 0.02f, .beta = 1e-3f}, device.limits);
    const Device<cuda::StepRecord> records(1);
    Device<uint64_t> stream_id(1);
    device.batch.stream_ids = stream_id.get();
    int steps = 0;
    for (uint64_t id = 0; id < 600; ++id) {
      stream_id.put({id});
      decode.run(device.batch, &index, nullptr, records.get());
      const cuda::StepRecord record = records.values()[0];
      EXPECT_GE(record.mass_std_error, 0) << "id " << id;  // not if it is no number
      EXPECT_LE(record.certain_mass, 1) << "id " << id;
      if (record.clusters_refined == 0) continue;
      ++steps;
      EXPECT_LT(relative_error(device.out(0), problem.out), 0.03) << "id " << id;
    }
    EXPECT_GT(steps, 1) << "the case is too easy";
  }
}

// Rows that refinement adds are looked at like those that were drawn.
TEST(Refine, ChangedRowsAreNoticed) {
  Problem problem(noise(DType::kF16, 8192), 1);
  see_first(problem, [](int64_t row) { return row == 3001 ? 0.8984375f : 0.0f; });
  problem.build_index();
  const Segment& segment = problem.index->state().segments[1];
  const HeadClusters& clusters = segment.heads[0];
  std::vector<int64_t> others;  // of the cluster that holds row 3001
  auto member = clusters.members.begin();
  for (const uint16_t size : clusters.sizes) {
    const auto end = member + size;
    if (std::find(member, end, uint16_t{3001 - 2048}) != end) others.assign(member, end);
    member = end;
  }
  for (const int64_t place : others) {
    if (place != 3001 - 2048) problem.cache.set_value(0, 2048 + place, problem.cache.value(0, 6000));
  }
  DeviceBatch device({&problem}, DeviceLayout::kPages16);
  cuda::LayerIndex index({}, {1, 64, 64}, 1, 8192);
  index.upload(0, *problem.index, nullptr);
  const Device<cuda::StepRecord> records(1);
  Device<uint64_t> stream_id(1);
  const Device<int32_t> none(std::vector<int32_t>{-1});
  device.batch.stream_ids = stream_id.get();
  device.batch.max_likely_rows = 1;
  for (const int32_t* likely :
       {static_cast<int32_t*>(nullptr), none.get()}) {  // the second: the kernel of learning steps
    device.batch.likely_rows = likely;
    cuda::Decode unchecked({.tau = 40, .refine = 0.02f, .beta = 1e-3f, .check_rows = false}, device.limits),
        checked({.tau = 40, .refine = 0.02f, .beta = 1e-3f}, device.limits);
    int refined = 0;
    for (uint64_t id = 0; id < 400; ++id) {
      stream_id.put({id});
      unchecked.run(device.batch, &index, nullptr, records.get());
      if (records.values()[0].clusters_refined == 0) continue;
      ++refined;
      checked.run(device.batch, &index, nullptr, records.get());
      EXPECT_EQ(records.values()[0].dense, DenseReason::kRowChanged) << "id " << id;
    }
    EXPECT_GT(refined, 1) << "the case is too easy";
  }
}

}  // namespace
}  // namespace tactic::test
