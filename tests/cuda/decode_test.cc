// On a GPU: steps against the reference in double precision, for every type, shape and layout.
#include "cuda/device.h"
#include "cuda/launch_config.h"
#include "cuda/layer_index.h"

namespace tactic::test {
namespace {

TEST(Dense, EqualsTheReference) {
  for (const DType dtype : kTypes) {
    for (const int32_t dim : kDims) {
      if (!fits(dtype, dim) || !cuda::is_compiled(dtype, dim)) continue;
      for (const int32_t group : {1, 3, 4, 8}) {
        for (const int64_t kv_len : {1, 31, 127, 4099}) {
          const DeviceLayout layout = kLayouts[static_cast<size_t>(kv_len + group) % std::size(kLayouts)];
          SCOPED_TRACE(text(dtype_name(dtype), " d", dim, " g", group, " kv_len ", kv_len, " layout ",
                            static_cast<int>(layout)));
          Problem problem(spec_of(dtype, dim, kv_len), group);
          round_queries(problem);
          DeviceBatch device({&problem}, layout);
          cuda::Decode decode({.select = Select::kDense}, device.limits);
          decode.run(device.batch, nullptr, nullptr);
          problem.run({.select = Select::kDense}, Backend::kReference);
          expect_near(problem, device.out(0), device.lse(0), dtype);
        }
      }
    }
  }
}

// Of the rows in clusters whose inclusion probability is within a thousandth of 1, which is what scores in 16-bit
// integers resolve.
double tied_mass(Problem& problem, float tau) {
  const auto certain = [&](float t) {
    Selection selection;
    problem.query.selection = &selection;
    problem.run({.tau = t, .refine = 1, .seed = 11}, Backend::kReference);
    return read_mass(problem, selection).certain;
  };
  return certain(tau * 1.001f) - certain(tau * 0.999f);
}

TEST(Decode, EqualsTheReferenceOnAnUploadedIndex) {
  for (const DType dtype : kTypes) {
    for (const int32_t dim : kDims) {
      if (!fits(dtype, dim) || !cuda::is_compiled(dtype, dim)) continue;
      for (const int32_t group : {1, 4, 7}) {
        for (const int64_t kv_len : {700, 5000}) {
          for (const float tau : {50.0f, 600.0f}) {
            const DeviceLayout layout = kLayouts[static_cast<size_t>(kv_len / 100 + group + dim) % std::size(kLayouts)];
            SCOPED_TRACE(text(dtype_name(dtype), " d", dim, " g", group, " kv_len ", kv_len, " tau ", tau, " layout ",
                              static_cast<int>(layout)));
            Problem problem(spec_of(dtype, dim, kv_len), group);
            round_queries(problem);
            problem.build_index();
            problem.query.position = kv_len - 1;
            problem.query.layer = 3;
            const DecodeOptions options{.tau = tau, .refine = 0.02f, .seed = 11};
            DeviceBatch device({&problem}, layout);
            cuda::LayerIndex index({}, {2, dim, dim}, 1, static_cast<int32_t>(kv_len));
            index.upload(0, *problem.index, nullptr);
            cuda::Decode decode(options, device.limits);
            const Device<cuda::StepRecord> records(2);
            decode.run(device.batch, &index, nullptr, records.get());
            Selection selection;
            problem.query.selection = &selection;
            const StepStats stats = problem.run(options, Backend::kReference);
            ASSERT_EQ(stats.dense, DenseReason::kNone);
            const ReadMass read = read_mass(problem, selection);
            int64_t tokens = 0, refined = 0;
            double mass = 0;
            for (const cuda::StepRecord& r : records.values()) {
              tokens += r.tokens_exact + r.tokens_selected + r.tokens_refined;
              refined += r.clusters_refined;
              mass += r.certain_mass / 2;
            }
            const auto expected = static_cast<double>(stats.tokens_certain + stats.tokens_sampled);
            EXPECT_NEAR(static_cast<double>(tokens), expected,
                        2 + 24.0 * std::abs(static_cast<double>(refined - stats.refined_clusters)) +
                            0.005 * expected);  // a tie at the limit refines a cluster or not
            EXPECT_NEAR(static_cast<double>(refined), static_cast<double>(stats.refined_clusters), 2);
            expect_near(problem, device.out(0), device.lse(0), dtype, 2 * std::sqrt(read.variance));
            // A cluster whose probability rounds to 1 or to just below is read whole by either, and certain to one.
            const double off = std::abs(mass - read.certain);
            EXPECT_LT(off, 0.02 + (off > 0.02 ? tied_mass(problem, tau) : 0));
          }
        }
      }
    }
  }
}

// The reference reads the same numbers as f16.
TEST(F8, EqualsTheReferenceOnTheNumbersItStandsFor) {
  const F8Scales scales{{0.75f, 1.25f}, {0.625f, 1.75f}};
  for (const int32_t dim : kDims) {
    if (!cuda::is_compiled(DType::kF8E4M3, dim)) continue;
    for (const int32_t group : {1, 4, 8}) {
      for (const DeviceLayout layout :
           {kLayouts[static_cast<size_t>(group) % 5], kLayouts[static_cast<size_t>(group + dim / 16) % 5]}) {
        SCOPED_TRACE(text("d", dim, " g", group, " layout ", static_cast<int>(layout)));
        Problem problem(spec_of(DType::kF16, dim, 3001), group);
        round_to_f8(problem.cache, scales);
        round_queries(problem);
        problem.build_index();
        problem.query.position = 3000;
        DeviceBatch device({&problem}, layout, &scales);
        cuda::Decode dense({.select = Select::kDense}, device.limits);
        dense.run(device.batch, nullptr, nullptr);
        problem.run({.select = Select::kDense}, Backend::kReference);
        expect_near(problem, device.out(0), device.lse(0), DType::kF16);

        const DecodeOptions options{.tau = 200, .refine = 0.02f, .check_rows = false};
        cuda::LayerIndex index({}, {2, dim, dim}, 1, 3001);
        index.upload(0, *problem.index, nullptr);
        cuda::Decode decode(options, device.limits);
        device.poison_out();
        decode.run(device.batch, &index, nullptr);
        Selection selection;
        problem.query.selection = &selection;
        problem.run(options, Backend::kReference);
        expect_near(problem, device.out(0), device.lse(0), DType::kF16,
                    2 * std::sqrt(read_mass(problem, selection).variance));
      }
    }
  }
}

TEST(Decode, RaggedBatchIsItsSequencesAlone) {
  std::vector<std::unique_ptr<Problem>> problems;
  std::vector<Problem*> pointers;
  for (const int64_t kv_len : {0, 1, 255, 256, 2048, 2304, 5000, 12001, 3}) {
    CacheSpec spec = spec_of(DType::kF16, 128, kv_len, 4);
    spec.seed = static_cast<uint64_t>(kv_len) + 5;
    problems.push_back(std::make_unique<Problem>(spec, 4, static_cast<uint64_t>(kv_len)));
    pointers.push_back(problems.back().get());
  }
  DeviceBatch device(pointers, DeviceLayout::kPages16);
  cuda::LayerIndex index({}, {4, 128, 128}, 16, 16384);
  for (size_t i = 0; i < pointers.size(); ++i)
    index.build(static_cast<int32_t>(i), device.batch, static_cast<int32_t>(pointers[i]->cache.spec().kv_len), nullptr);
  const DecodeOptions options{.tau = 300, .refine = 0.01f};
  cuda::Decode decode(options, device.limits);
  decode.run(device.batch, &index, nullptr);
  std::vector<std::vector<float>> together;
  for (size_t i = 0; i < pointers.size(); ++i) together.push_back(device.out(i));
  for (int again = 0; again < 3; ++again) {
    device.poison_out();
    decode.run(device.batch, &index, nullptr);
    for (size_t i = 0; i < pointers.size(); ++i)
      EXPECT_TRUE(same_bits(device.out(i), together[i])) << "sequence " << i << " run " << again;
  }
  const std::vector<Problem*> reversed(pointers.rbegin(), pointers.rend());
  DeviceBatch other(reversed, DeviceLayout::kPages16);
  cuda::LayerIndex other_index({}, {4, 128, 128}, 16, 16384);
  for (size_t i = 0; i < reversed.size(); ++i)
    other_index.build(static_cast<int32_t>(i), other.batch, static_cast<int32_t>(reversed[i]->cache.spec().kv_len),
                      nullptr);
  decode.run(other.batch, &other_index, nullptr);
  for (size_t i = 0; i < pointers.size(); ++i)
    EXPECT_TRUE(same_bits(other.out(pointers.size() - 1 - i), together[i])) << "sequence " << i << " at another place";
  for (size_t i = 0; i < pointers.size(); ++i) {
    if (pointers[i]->cache.spec().kv_len == 0) {
      for (const float x : together[i]) EXPECT_EQ(x, 0);
      for (const float x : device.lse(i)) EXPECT_EQ(x, -HUGE_VALF);
      continue;
    }
    pointers[i]->run({.select = Select::kDense}, Backend::kReference);
    EXPECT_LT(relative_error(together[i], pointers[i]->out), 0.25) << "sequence " << i;
  }
}

TEST(Decode, TauWithoutEndIsDense) {
  Problem problem(spec_of(DType::kF16, 128, 9000, 2), 4, 7, 0.05f);  // no row weighs less than 1e-9
  DeviceBatch device({&problem}, DeviceLayout::kTokenMajor);
  cuda::LayerIndex index({}, {2, 128, 128}, 1, 9000);
  index.build(0, device.batch, 9000, nullptr);
  cuda::Decode decode({.tau = 1e9f}, device.limits);
  const Device<cuda::StepRecord> records(2);
  decode.run(device.batch, &index, nullptr, records.get());
  for (const cuda::StepRecord& r : records.values()) {
    EXPECT_EQ(r.tokens_exact + r.tokens_selected, 9000);  // every row in exactly one of sinks, clusters, recent
    EXPECT_EQ(r.certain_mass, 1);
  }
  problem.run({.select = Select::kDense}, Backend::kReference);
  expect_near(problem, device.out(0), device.lse(0), DType::kF16);
}

TEST(Decode, GraphStaysValidWhileTheIndexGrows) {
  Problem problem(spec_of(DType::kBF16, 64, 6000, 2), 2);
  DeviceBatch device({&problem}, DeviceLayout::kTokenMajor);
  cuda::LayerIndex index({}, {2, 64, 64}, 1, 8192);
  cuda::Decode decode({.tau = 400}, device.limits);
  cudaStream_t stream = nullptr;
  ASSERT_EQ(cudaStreamCreate(&stream), cudaSuccess);
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t executable = nullptr;
  device.set_lens({700});
  index.build(0, device.batch, 700, stream);
  for (int capture = 0; capture < 2; ++capture) {
    ASSERT_EQ(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), cudaSuccess);
    decode.run(device.batch, &index, stream);
    ASSERT_EQ(cudaStreamEndCapture(stream, &graph), cudaSuccess);
    ASSERT_EQ(cudaGraphInstantiate(&executable, graph, 0), cudaSuccess);
  }
  for (const int32_t kv_len : {700, 2100, 4500, 6000, 3000}) {
    device.set_lens({kv_len});
    index.truncate(0, kv_len, stream);
    index.build(0, device.batch, kv_len, stream);
    device.poison_out();
    ASSERT_EQ(cudaGraphLaunch(executable, stream), cudaSuccess);
    ASSERT_EQ(cudaStreamSynchronize(stream), cudaSuccess);
    const std::vector<float> replayed = device.out(0);
    device.poison_out();
    decode.run(device.batch, &index, stream);
    ASSERT_EQ(cudaStreamSynchronize(stream), cudaSuccess);
    EXPECT_TRUE(same_bits(replayed, device.out(0))) << "kv_len " << kv_len;
    problem.query.kv = problem.cache.view();
    problem.query.kv.kv_len = kv_len;
    Attention({.select = Select::kDense}, Backend::kReference).run({&problem.query, 1});
    EXPECT_LT(relative_error(replayed, problem.out), 0.25) << "kv_len " << kv_len;
  }
  cudaStreamDestroy(stream);
}

TEST(Decode, SamplingIsUnbiased) {
  Problem problem(spec_of(DType::kF16, 64, 4000, 1), 2, 7, 0.3f);
  DeviceBatch device({&problem}, DeviceLayout::kTokenMajor);
  cuda::LayerIndex index({}, {1, 64, 64}, 1, 4096);
  index.build(0, device.batch, 4000, nullptr);
  problem.run({.select = Select::kDense}, Backend::kReference);
  std::vector<double> mean(2);
  constexpr int kDraws = 400;
  for (int i = 0; i < kDraws; ++i) {
    cuda::Decode decode({.tau = 150, .refine = 1, .seed = static_cast<uint64_t>(i)}, device.limits);
    decode.run(device.batch, &index, nullptr);
    const std::vector<float> lse = device.lse(0);
    for (size_t h = 0; h < 2; ++h) mean[h] += std::exp(lse[h] - problem.lse[h]) / kDraws;
  }
  for (const double m : mean) EXPECT_NEAR(m, 1, 0.01);
}

TEST(Decode, NotANumberStaysInItsSequence) {
  std::vector<std::unique_ptr<Problem>> problems;
  for (int i = 0; i < 3; ++i) {
    CacheSpec spec = spec_of(DType::kF16, 64, 3000, 2);
    spec.seed = static_cast<uint64_t>(i) + 1;
    problems.push_back(std::make_unique<Problem>(spec, 2));
  }
  const DecodeOptions selectors[] = {{.tau = 300}, {.select = Select::kFit}, {.select = Select::kTopK, .budget = 300}};
  std::vector<std::vector<float>> clean;
  for (const bool poisoned : {false, true}) {
    if (poisoned) problems[1]->cache.poison(1500);
    DeviceBatch device({problems[0].get(), problems[1].get(), problems[2].get()}, DeviceLayout::kPages64);
    cuda::LayerIndex index({}, {2, 64, 64}, 3, 4096);
    for (int32_t i = 0; i < 3; ++i) index.build(i, device.batch, 3000, nullptr);
    for (size_t select = 0; select < std::size(selectors); ++select) {
      SCOPED_TRACE(select_name(selectors[select].select));
      cuda::Decode decode(selectors[select], device.limits);
      device.poison_out();
      decode.run(device.batch, &index, nullptr);
      if (!poisoned) {
        for (size_t i = 0; i < 3; ++i) clean.push_back(device.out(i));
        continue;
      }
      EXPECT_TRUE(same_bits(device.out(0), clean[3 * select]));
      EXPECT_TRUE(same_bits(device.out(2), clean[3 * select + 2]));
      for (const float x : device.out(1)) EXPECT_TRUE(std::isnan(x));
    }
  }
}

TEST(Decode, KeysThatAreAllEqualAndOneThatHoldsAll) {
  for (const bool heavy : {false, true}) {
    Problem problem(spec_of(DType::kF16, 64, 3000, 1), 3);
    std::vector<float> key(64, 0.5f);
    for (int64_t row = 0; row < 3000; ++row) problem.cache.set_key(0, row, key);
    for (size_t d = 0; d < 64; ++d) key[d] = 20 * problem.q[d];
    if (heavy) problem.cache.set_key(0, 1777, key);
    DeviceBatch device({&problem}, DeviceLayout::kHeadMajor);
    cuda::LayerIndex index({}, {1, 64, 64}, 1, 4096);
    index.build(0, device.batch, 3000, nullptr);
    cuda::Decode decode({.tau = 1000}, device.limits);
    decode.run(device.batch, &index, nullptr);
    problem.run({.select = Select::kDense}, Backend::kReference);
    std::vector<float> out = device.out(0), expected = problem.out;
    if (heavy) out.resize(64), expected.resize(64);  // it is the first head's query that the key matches
    EXPECT_LT(relative_error(out, expected), heavy ? 0.002 : 0.35) << heavy;  // flat: sampling noise over a small mean
  }
}

// Small, for compute-sanitizer: every kernel, ragged lengths, refinement, several blocks a head.
TEST(Sanitized, EveryKernel) {
  std::vector<std::unique_ptr<Problem>> problems;
  for (const int64_t kv_len : {0, 5, 2500})
    problems.push_back(std::make_unique<Problem>(spec_of(DType::kBF16, 64, kv_len, 2), 4));
  DeviceBatch device({problems[0].get(), problems[1].get(), problems[2].get()}, DeviceLayout::kPages16);
  cuda::LayerIndex index({}, {2, 64, 64}, 3, 4096);
  for (int32_t i = 0; i < 3; ++i)
    index.build(i, device.batch, static_cast<int32_t>(problems[static_cast<size_t>(i)]->cache.spec().kv_len), nullptr);
  const Device<cuda::StepRecord> records(6);
  cuda::Decode sample({.tau = 200, .refine = 0.001f, .beta = 0.1f}, device.limits),
      dense({.select = Select::kDense}, device.limits);
  sample.run(device.batch, &index, nullptr, records.get());
  EXPECT_GT(records.values()[4].clusters_refined + records.values()[5].clusters_refined, 0);
  const std::vector<float> sampled = device.out(2);
  dense.run(device.batch, nullptr, nullptr);
  const std::vector<float> exact = device.out(2);
  EXPECT_LT(relative_error(sampled, exact), 0.4);
  for (const Select select : {Select::kFit, Select::kTopK}) {
    cuda::Decode rank({.select = select, .target_mass = 0.99f, .budget = 1000}, device.limits);
    rank.run(device.batch, &index, nullptr);
    EXPECT_LT(relative_error(device.out(2), exact), 0.4);
  }
  device.batch.layer = 5;  // a position at which a step learns
  device.batch.learn = true;
  sample.run(device.batch, &index, nullptr);
  sample.run(device.batch, &index, nullptr, records.get());  // and measures its draw
  EXPECT_GT(records.values()[4].mass_std_error + records.values()[5].mass_std_error, 0);
  cuda::Decode verify({.tau = 200, .refine = 0.001f, .target_mass = 0.95f, .beta = 0.1f}, device.limits);
  const int32_t refined = records.values()[4].tokens_refined;
  verify.run(device.batch, &index, nullptr, records.get());  // reads on
  EXPECT_GT(records.values()[4].tokens_refined, refined);
  EXPECT_GT(records.values()[4].certain_mass, 0.9f);
  // Rows that the index was not made of: every row is read.
  DeviceBatch moved({problems[2].get(), problems[0].get(), problems[1].get()}, DeviceLayout::kTokenMajor);
  cuda::LayerIndex other({}, {2, 64, 64}, 3, 4096);
  CacheSpec spec = spec_of(DType::kBF16, 64, 2500, 2);
  spec.seed = 9;
  Problem another(spec, 4);
  const DeviceBatch another_batch({&another}, DeviceLayout::kTokenMajor);
  other.build(0, another_batch.batch, 2500, nullptr);
  sample.run(moved.batch, &other, nullptr, records.get());
  EXPECT_EQ(records.values()[0].dense, DenseReason::kRowChanged);
  EXPECT_LT(relative_error(moved.out(0), exact), tolerance(DType::kBF16));
  ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
}

TEST(Cluster, AsGoodAsOnTheCpu) {
  const F8Scales scales{{0.75f, 1.25f}, {0.625f, 1.75f}};
  for (const DType dtype : {DType::kF16, DType::kBF16, DType::kQ8_0, DType::kF8E4M3}) {
    if (!cuda::is_compiled(dtype, 128)) continue;
    const bool f8 = dtype == DType::kF8E4M3;
    Problem problem(spec_of(f8 ? DType::kF16 : dtype, 128, 4096 + 256, 2), 4);
    if (f8) round_to_f8(problem.cache, scales);
    problem.build_index();
    DeviceBatch device({&problem}, DeviceLayout::kTokenMajor, f8 ? &scales : nullptr);
    enum Maker { kUploaded, kBuilt, kBuiltInParts };  // the last as on a device with 99 KB of shared memory
    double error[3] = {};
    for (const Maker maker : {kUploaded, kBuilt, kBuiltInParts}) {
      cuda::LayerIndex index({}, {2, 128, 128}, 1, 8192);
      if (maker == kUploaded) {
        index.upload(0, *problem.index, nullptr);
      } else {
        auto& facts = const_cast<cuda::DeviceFacts&>(index.impl().device);
        if (maker == kBuiltInParts) facts.shared_bytes_per_block = 99 << 10;
        index.build(0, device.batch, 4096 + 256, nullptr);
      }
      problem.run({.select = Select::kDense}, Backend::kReference);
      for (uint64_t seed = 0; seed < 20; ++seed) {
        cuda::Decode decode({.tau = 300, .check_rows = false, .seed = seed}, device.limits);
        decode.run(device.batch, &index, nullptr);
        error[maker] += relative_error(device.out(0), problem.out) / 20;
      }
    }
    EXPECT_LT(error[kBuilt], 1.15 * error[kUploaded] + 1e-3) << dtype_name(dtype);
    EXPECT_LT(error[kBuiltInParts], 1.15 * error[kUploaded] + 1e-3) << dtype_name(dtype);
  }
}

}  // namespace
}  // namespace tactic::test
