// On a GPU: steps that read on until they have the mass that is asked for, against the reference.
#include <algorithm>
#include <cmath>

#include "cuda/device.h"
#include "cuda/layer_index.h"

namespace tactic::test {
namespace {

constexpr int32_t kLen = 6000;

// One problem as every sequence of a batch, each with a draw of its own.
struct Draws {
  DeviceBatch device;
  cuda::LayerIndex index;
  Device<cuda::StepRecord> records;
  Device<uint64_t> ids;

  Draws(Problem& problem, size_t count)
      : device(std::vector<Problem*>(count, &problem), DeviceLayout::kTokenMajor),
        index({}, {device.batch.num_kv_heads, device.batch.head_dim, device.batch.head_dim},
              static_cast<int32_t>(count), static_cast<int32_t>(problem.cache.spec().kv_len)),
        records(count * static_cast<size_t>(device.batch.num_kv_heads)),
        ids(count) {
    for (size_t i = 0; i < count; ++i) index.upload(static_cast<int32_t>(i), *problem.index, nullptr);
    device.batch.stream_ids = ids.get();
  }
  // The draws of streams first, first + 1, ...
  std::vector<cuda::StepRecord> run(const DecodeOptions& options, uint64_t first) {
    std::vector<uint64_t> streams(static_cast<size_t>(device.batch.num_sequences));
    for (size_t i = 0; i < streams.size(); ++i) streams[i] = first + i;
    ids.put(streams);
    device.poison_out();
    cuda::Decode decode(options, device.limits);
    decode.run(device.batch, &index, nullptr, records.get());
    return records.values();
  }
};

int32_t tokens_of(const cuda::StepRecord& r) { return r.tokens_exact + r.tokens_selected + r.tokens_refined; }

CacheSpec spec_with_seed(DType dtype, int32_t dim, uint64_t seed, int32_t kv_len = kLen) {
  CacheSpec spec = spec_of(dtype, dim, kv_len);
  spec.seed = seed;
  return spec;
}

// A head's certain rows have certain_mass of what was measured, which without refinement is what its lse says.
TEST(ReadOn, TheMassIsReached) {
  for (const float target : {0.85f, 0.88f, 0.9f}) {
    int reached = 0, heads = 0, read_on = 0;
    int64_t tokens = 0;
    for (uint64_t seed = 1; seed <= 12; ++seed) {
      Problem problem(spec_with_seed(DType::kF16, 64, seed), 1, seed, 0.4f);
      round_queries(problem);
      problem.build_index();
      problem.run({.select = Select::kDense}, Backend::kReference);
      for (const size_t draws : {size_t{1}, size_t{40}}) {  // blocks of a cluster, and a block alone
        Draws steps(problem, draws);
        const DecodeOptions options{.tau = 400, .refine = 1, .target_mass = target, .beta = 1};
        const std::vector<cuda::StepRecord> records = steps.run(options, 100 * seed);
        for (size_t i = 0; i < records.size(); ++i) {
          const float lse = steps.device.lse(i / 2)[i % 2];
          const double mass = records[i].certain_mass * std::exp(lse - problem.lse[i % 2]);
          EXPECT_GE(records[i].certain_mass, target);
          EXPECT_LE(mass, 1.01);
          EXPECT_EQ(records[i].clusters_refined, 0);
          ++heads;
          reached += mass >= target;
          read_on += records[i].tokens_refined > 0;
          tokens += tokens_of(records[i]);
        }
      }
    }
    EXPECT_GE(reached, heads * 99 / 100) << target;
    EXPECT_GT(read_on, heads / 8) << target << ": the case is too easy";
    EXPECT_LT(tokens, int64_t{heads} * kLen * 9 / 10) << target << ": the case is too hard";
  }
}

TEST(ReadOn, RowsAreTheReferences) {
  struct Case {
    DType dtype;
    int32_t dim, group;
    float refine;
  };
  for (const Case& c : {Case{DType::kF16, 64, 4, 0.02f}, {DType::kF16, 64, 4, 1}, {DType::kBF16, 128, 7, 0.02f}}) {
    for (const float target : {0.6f, 0.8f, 0.9f}) {
      SCOPED_TRACE(text(dtype_name(c.dtype), " d", c.dim, " g", c.group, " refine ", c.refine, " target ", target));
      Problem problem(spec_with_seed(c.dtype, c.dim, 5), c.group, 5, 0.4f);
      round_queries(problem);
      problem.build_index();
      problem.query.position = kLen - 1;
      problem.run({.select = Select::kDense}, Backend::kReference);
      const std::vector<float> exact = problem.out;
      const DecodeOptions options{.tau = 500, .refine = c.refine, .target_mass = target, .beta = 1, .seed = 3};
      constexpr uint64_t kDraws = 16;
      double expected = 0, expected_mass = 0, expected_error = 0, error_of_reference = 0;
      for (uint64_t id = 0; id < kDraws; ++id) {
        problem.query.stream_id = id;
        const StepStats stats = problem.run(options, Backend::kReference);
        ASSERT_EQ(stats.dense, DenseReason::kNone);
        expected += static_cast<double>(stats.tokens_certain + stats.tokens_sampled) / kDraws;
        expected_mass += stats.estimated_mass / kDraws;
        expected_error += stats.mass_std_error / kDraws;
        error_of_reference += relative_error(problem.out, exact) / kDraws;
      }
      for (const size_t draws : {size_t{1}, size_t{16}, size_t{64}}) {  // blocks of a step: 8, few, 1
        Draws steps(problem, draws);
        double got = 0, mass = 0, mass_error = 0, error = 0;
        const auto each = 1.0 / static_cast<double>(kDraws);
        for (uint64_t first = 0; first < kDraws; first += draws) {
          const std::vector<cuda::StepRecord> records = steps.run(options, first);
          for (size_t i = 0; i < std::min<size_t>(draws, kDraws); ++i) {
            const StepStats stats = cuda::step_stats(&records[2 * i], steps.device.batch, {});
            ASSERT_EQ(stats.dense, DenseReason::kNone);
            got += each * static_cast<double>(stats.tokens_certain + stats.tokens_sampled);
            mass += each * stats.estimated_mass;
            mass_error += each * stats.mass_std_error;
            error += each * relative_error(steps.device.out(i), exact);
          }
        }
        // Where few draws are left, what they say depends on their order, which blocks change.
        EXPECT_NEAR(got / expected, 1, c.group == 7 ? 0.2 : 0.05) << draws;
        EXPECT_NEAR(mass, expected_mass, 0.01) << draws;
        EXPECT_NEAR(mass_error / expected_error, 1, 0.4) << draws;
        EXPECT_LT(error, 1.4 * error_of_reference + tolerance(c.dtype)) << draws;
      }
    }
  }
}

// Where much is refined and some of that ranks with what is read on: without bias, as the reference's.
TEST(ReadOn, TheMassOfMuchRefinedIsTheReferences) {
  constexpr uint64_t kDraws = 40;
  double mass = 0, expected = 0;
  int refined = 0, heads = 0;
  for (uint64_t seed = 1; seed <= 4; ++seed) {
    CacheSpec spec = spec_with_seed(DType::kF16, 64, seed, 12000);
    spec.topic_scale = 1;
    Problem problem(spec, 1, seed);
    round_queries(problem);
    problem.build_index();
    problem.query.position = spec.kv_len - 1;
    const DecodeOptions options{.tau = 500, .refine = 0.02f, .target_mass = 0.9f, .beta = 0.1f, .seed = 3};
    for (uint64_t id = 0; id < kDraws; ++id) {
      problem.index->state().calibration.assign(2, {});
      problem.query.stream_id = id;
      expected += 2 * problem.run(options, Backend::kReference).estimated_mass;
    }
    problem.index->state().calibration.assign(2, {});
    for (const size_t draws : {size_t{1}, size_t{40}}) {
      Draws steps(problem, draws);
      for (uint64_t first = 0; first < kDraws; first += draws) {
        for (const cuda::StepRecord& r : steps.run(options, first)) {
          mass += r.certain_mass;
          refined += r.clusters_refined;
          ++heads;
        }
      }
    }
  }
  EXPECT_GT(refined, heads) << "the case is too easy";
  EXPECT_NEAR(mass / heads, 2 * expected / heads, 0.002);
}

TEST(ReadOn, UntilEverythingIsRead) {
  for (const size_t count : {size_t{1}, size_t{70}}) {
    for (const int32_t group : {1, 4, 8}) {
      for (const float target : {0.99999f, 1.0f}) {
        SCOPED_TRACE(text("count ", count, " group ", group, " target ", target));
        Problem problem(spec_of(DType::kF16, 64, kLen), group, 7, 0.3f);
        round_queries(problem);
        problem.build_index();
        problem.run({.select = Select::kDense}, Backend::kReference);
        Draws steps(problem, count);
        // Rows that are read anyway are read once, and leave their clusters' draws.
        std::vector<int32_t> likely(count * 3);
        for (size_t i = 0; i < likely.size(); ++i) likely[i] = static_cast<int32_t>(700 + 1000 * (i % 3));
        const Device<int32_t> rows(likely);
        steps.device.batch.likely_rows = rows.get();
        steps.device.batch.max_likely_rows = 3;
        const std::vector<cuda::StepRecord> records = steps.run({.tau = 30, .target_mass = target}, 1);
        for (const cuda::StepRecord& r : records) {
          EXPECT_EQ(r.dense, DenseReason::kNone);
          EXPECT_EQ(tokens_of(r), kLen);
          EXPECT_EQ(r.tokens_sampled, 0);
          EXPECT_EQ(r.certain_mass, 1);
          EXPECT_EQ(r.mass_std_error, 0);
        }
        for (const size_t i : {size_t{0}, count - 1})
          expect_near(problem, steps.device.out(i), steps.device.lse(i), DType::kF16);
      }
    }
  }
}

// Whatever the other sequences of the batch are, and wherever in it a sequence stands.
TEST(ReadOn, SequencesDoNotKnowOfOneAnother) {
  std::vector<std::unique_ptr<Problem>> problems;
  for (uint64_t seed = 1; seed <= 4; ++seed) {
    problems.push_back(
        std::make_unique<Problem>(spec_with_seed(DType::kF16, 64, seed, 2000 + 900 * static_cast<int32_t>(seed)), 4,
                                  seed, 0.2f * static_cast<float>(seed)));
    round_queries(*problems.back());
    problems.back()->build_index();
  }
  const auto run = [&](const std::vector<size_t>& order) {
    std::vector<Problem*> pointers;
    std::vector<uint64_t> streams;
    for (const size_t i : order) {
      pointers.push_back(problems[i].get());
      streams.push_back(i);
    }
    DeviceBatch device(pointers, DeviceLayout::kPages16);
    cuda::LayerIndex index({}, {2, 64, 64}, static_cast<int32_t>(order.size()), kLen);
    for (size_t i = 0; i < order.size(); ++i)
      index.upload(static_cast<int32_t>(i), *problems[order[i]]->index, nullptr);
    const Device<uint64_t> ids(streams);
    device.batch.stream_ids = ids.get();
    cuda::Decode decode({.tau = 200, .target_mass = 0.9f}, device.limits);
    const Device<cuda::StepRecord> records(2 * order.size());
    decode.run(device.batch, &index, nullptr, records.get());
    const auto at = static_cast<size_t>(std::find(order.begin(), order.end(), 0u) - order.begin());
    EXPECT_GT(records.values()[2 * at].tokens_refined, 0) << "the case is too easy";
    std::vector<float> result = device.out(at), lse = device.lse(at);
    result.insert(result.end(), lse.begin(), lse.end());
    result.push_back(records.values()[2 * at].certain_mass);
    return result;
  };
  const std::vector<float> first = run({0, 1, 2});
  EXPECT_TRUE(same_bits(first, run({0, 1, 2}))) << "the same step twice";
  EXPECT_TRUE(same_bits(first, run({0, 3, 1})));
  EXPECT_TRUE(same_bits(first, run({3, 2, 0})));
}

TEST(ReadOn, InAGraph) {
  Problem problem(spec_of(DType::kBF16, 64, kLen), 4, 7, 0.3f);
  round_queries(problem);
  problem.build_index();
  problem.run({.select = Select::kDense}, Backend::kReference);
  DeviceBatch device({&problem}, DeviceLayout::kPages16);
  cuda::LayerIndex index({}, {2, 64, 64}, 1, kLen);
  index.upload(0, *problem.index, nullptr);
  cuda::Decode decode({.tau = 100, .target_mass = 0.95f}, device.limits);
  const Device<cuda::StepRecord> records(2);
  Device<uint64_t> id(1);
  device.batch.stream_ids = id.get();
  cudaStream_t stream = nullptr;
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t executable = nullptr;
  ASSERT_EQ(cudaStreamCreate(&stream), cudaSuccess);
  ASSERT_EQ(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), cudaSuccess);
  decode.run(device.batch, &index, stream, records.get());
  decode.run(device.batch, &index, stream, records.get());  // begins before the first has ended
  ASSERT_EQ(cudaStreamEndCapture(stream, &graph), cudaSuccess);
  ASSERT_EQ(cudaGraphInstantiate(&executable, graph, 0), cudaSuccess);
  std::vector<float> outs[3];
  for (uint64_t i = 0; i < 3; ++i) {
    id.put({i});
    decode.run(device.batch, &index, stream, records.get());
    ASSERT_EQ(cudaStreamSynchronize(stream), cudaSuccess);
    outs[i] = device.out(0);
    const std::vector<cuda::StepRecord> expected = records.values();
    for (int again = 0; again < 3; ++again) {
      device.poison_out();
      ASSERT_EQ(cudaGraphLaunch(executable, stream), cudaSuccess);
      ASSERT_EQ(cudaStreamSynchronize(stream), cudaSuccess);
      EXPECT_TRUE(same_bits(device.out(0), outs[i]));
      EXPECT_EQ(records.values()[0].certain_mass, expected[0].certain_mass);
      EXPECT_EQ(records.values()[1].tokens_refined, expected[1].tokens_refined);
    }
    EXPECT_GT(expected[0].tokens_refined, 0);
    EXPECT_LT(relative_error(outs[i], problem.out), 0.2);
  }
  EXPECT_FALSE(same_bits(outs[0], outs[1])) << "another stream draws otherwise";
  // A sequence that is shorter, and read whole because its index holds hidden rows: nothing to read on for.
  device.set_lens({5000});
  ASSERT_EQ(cudaGraphLaunch(executable, stream), cudaSuccess);
  ASSERT_EQ(cudaStreamSynchronize(stream), cudaSuccess);
  EXPECT_EQ(records.values()[0].dense, DenseReason::kNoIndex);
  cudaGraphExecDestroy(executable);
  cudaGraphDestroy(graph);
  cudaStreamDestroy(stream);
}

TEST(ReadOn, OtherMassesAreRefused) {
  const cuda::DecodeLimits limits{1, 8, 2, 64, kLen, {}};
  for (const float target : {-0.1f, 1.01f, std::nanf("")}) {
    EXPECT_THROW(cuda::Decode({.target_mass = target}, limits), Error) << target;
    EXPECT_THROW(Attention({.target_mass = target}), Error) << target;
  }
  EXPECT_NO_THROW(cuda::Decode({.target_mass = 1}, limits));
}

// Rows that a step reads on for are checked too.
TEST(ReadOn, ChangedRowsAreNoticed) {
  Problem problem(spec_of(DType::kF16, 64, kLen), 4, 7, 0.3f), changed(spec_of(DType::kF16, 64, kLen), 4, 7, 0.3f);
  round_queries(problem);
  round_queries(changed);
  problem.build_index();
  // Rows that a small draw misses.
  for (int64_t row = 1200; row < 1240; ++row) {
    changed.cache.set_value(0, row, changed.cache.value(0, row + 500));
    changed.cache.set_value(1, row, changed.cache.value(1, row + 500));
  }
  changed.run({.select = Select::kDense}, Backend::kReference);
  DeviceBatch device({&changed}, DeviceLayout::kHeadMajor);
  cuda::LayerIndex index({}, {2, 64, 64}, 1, kLen);
  index.upload(0, *problem.index, nullptr);
  const Device<cuda::StepRecord> records(2);
  for (const bool checks : {true, false}) {
    for (const float target : {0.0f, 1.0f}) {
      cuda::Decode decode({.tau = 1, .target_mass = target, .check_rows = checks}, device.limits);
      decode.run(device.batch, &index, nullptr, records.get());
      const bool noticed = checks && target == 1;
      EXPECT_EQ(records.values()[0].dense, noticed ? DenseReason::kRowChanged : DenseReason::kNone) << target;
      if (noticed) expect_near(changed, device.out(0), device.lse(0), DType::kF16);
    }
  }
}

// Whether anybody asks for records or not.
TEST(ReadOn, RecordsChangeNothing) {
  Problem problem(spec_of(DType::kF16, 64, kLen), 4, 7, 0.4f);
  round_queries(problem);
  problem.build_index();
  std::vector<float> outs[2];
  std::vector<cuda::HeadCalibration> known[2];
  for (const bool asked : {true, false}) {
    DeviceBatch device({&problem}, DeviceLayout::kTokenMajor);
    device.batch.learn = true;
    cuda::LayerIndex index({}, {2, 64, 64}, 1, kLen);
    index.upload(0, *problem.index, nullptr);
    cuda::Decode decode({.tau = 300, .target_mass = 0.9f}, device.limits);
    const Device<cuda::StepRecord> records(2);
    for (const uint64_t id : {1, 2, 3, 4, 5, 6}) {
      const Device<uint64_t> ids(std::vector<uint64_t>{id});
      device.batch.stream_ids = ids.get();
      decode.run(device.batch, &index, nullptr, asked ? records.get() : nullptr);
      const std::vector<float> out = device.out(0);
      outs[asked].insert(outs[asked].end(), out.begin(), out.end());
    }
    known[asked].resize(2);
    cudaMemcpy(known[asked].data(), index.impl().view.calibration, 2 * sizeof(cuda::HeadCalibration),
               cudaMemcpyDeviceToHost);
  }
  EXPECT_TRUE(same_bits(outs[0], outs[1]));
  for (size_t h = 0; h < 2; ++h) {
    for (int g = 0; g < 4; ++g) {
      EXPECT_GT(known[1][h].usual_variance[g], 0);
      EXPECT_EQ(known[0][h].usual_variance[g], known[1][h].usual_variance[g]);
    }
  }
}

// What a step learns is of its draw, whatever it reads on for.
TEST(ReadOn, LearnsWhatOtherStepsLearn) {
  for (const float refine : {1.0f, 0.02f}) {
    Problem problem(spec_of(DType::kF16, 64, 6001), 4, 7, 0.4f);
    round_queries(problem);
    problem.build_index();
    const auto learned = [&](float target) {
      DeviceBatch device({&problem}, DeviceLayout::kTokenMajor);
      device.batch.learn = true;
      cuda::LayerIndex index({}, {2, 64, 64}, 1, 6001);
      index.upload(0, *problem.index, nullptr);
      cuda::Decode decode({.tau = 300, .refine = refine, .target_mass = target}, device.limits);
      const Device<cuda::StepRecord> records(2);
      decode.run(device.batch, &index, nullptr, records.get());
      EXPECT_EQ(records.values()[0].tokens_refined > 500, target > 0) << "the case is too easy";
      std::vector<cuda::HeadCalibration> known(2);
      cudaMemcpy(known.data(), index.impl().view.calibration, 2 * sizeof(known[0]), cudaMemcpyDeviceToHost);
      return known;
    };
    const std::vector<cuda::HeadCalibration> expected = learned(0), got = learned(0.97f);
    for (size_t h = 0; h < 2; ++h) {
      EXPECT_EQ(got[h].sum_xx, expected[h].sum_xx);
      EXPECT_EQ(got[h].sum_xy, expected[h].sum_xy);
      EXPECT_GT(expected[h].sum_xx, 0);
      EXPECT_NEAR(got[h].variance_ratio, expected[h].variance_ratio, 0.01);
      EXPECT_NE(expected[h].variance_ratio, 1);
      for (int g = 0; g < 4; ++g) {
        EXPECT_GT(expected[h].usual_variance[g], 0);
        EXPECT_NEAR(got[h].usual_variance[g] / expected[h].usual_variance[g], 1, 0.5) << "other neighbors";
      }
    }
  }
}

}  // namespace
}  // namespace tactic::test
