// On a GPU: the ranking selectors against the reference.
#include "cuda/device.h"
#include "cuda/launch_config.h"

namespace tactic::test {
namespace {

TEST(Rank, FitAndTopKReadWhatTheReferenceReads) {
  for (const DType dtype : kTypes) {
    for (const int32_t dim : kDims) {
      if (!fits(dtype, dim) || !cuda::is_compiled(dtype, dim)) continue;
      for (const int32_t group : {1, 4, 7}) {
        for (const int64_t kv_len : {700, 5000}) {
          if (dim != 64 && kv_len == 5000 && group == 4) continue;  // the reference is slow
          const DeviceLayout layout = kLayouts[static_cast<size_t>(kv_len / 100 + group + dim) % std::size(kLayouts)];
          Problem problem(spec_of(dtype, dim, kv_len), group);
          round_queries(problem);
          problem.build_index();
          DeviceBatch device({&problem}, layout);
          cuda::LayerIndex index({}, {2, dim, dim}, 1, static_cast<int32_t>(kv_len));
          index.upload(0, *problem.index, nullptr);
          for (const DecodeOptions& options : {DecodeOptions{.select = Select::kTopK, .budget = 200},
                                               {.select = Select::kTopK, .budget = 1},
                                               {.select = Select::kFit, .target_mass = 0.5f},
                                               {.select = Select::kFit},
                                               {.select = Select::kFit, .target_mass = 1}}) {
            SCOPED_TRACE(text(dtype_name(dtype), " d", dim, " g", group, " kv_len ", kv_len, " ",
                              select_name(options.select), " ", options.target_mass, " ", options.budget));
            cuda::Decode decode(options, device.limits);
            const Device<cuda::StepRecord> records(2);
            device.poison_out();
            decode.run(device.batch, &index, nullptr, records.get());
            const StepStats stats = problem.run(options, Backend::kReference);
            ASSERT_EQ(stats.dense, DenseReason::kNone);
            int64_t tokens = 0;
            for (const cuda::StepRecord& r : records.values()) tokens += r.tokens_exact + r.tokens_selected;
            // A tie in the order or at the target moves a head's end by a token or a cluster.
            EXPECT_NEAR(static_cast<double>(tokens), static_cast<double>(stats.tokens_certain),
                        options.target_mass < 1 ? 2 + 0.002 * static_cast<double>(stats.tokens_certain) : 0);
            expect_near(problem, device.out(0), device.lse(0), dtype, 2e-3);
          }
        }
      }
    }
  }
}

// Scores of which many are equal, or all but one close together: clusters of one bin, ordered another way than few.
TEST(Rank, EqualAndCrowdedScoresAreOrdered) {
  for (const bool equal : {true, false}) {
    Problem problem(spec_of(DType::kF16, 64, 20000, 1), 2);
    if (equal) {
      std::fill(problem.q.begin(), problem.q.begin() + 64, 0.0f);
    } else {
      std::vector<float> key = problem.cache.key(0, 9000);
      for (float& x : key) x *= 5000;
      problem.cache.set_key(0, 9000, key);
    }
    round_queries(problem);
    problem.build_index();
    DeviceBatch device({&problem}, DeviceLayout::kTokenMajor);
    cuda::LayerIndex index({}, {1, 64, 64}, 1, 20000);
    index.upload(0, *problem.index, nullptr);
    for (const int32_t budget : {1, 100, 777, 5000, 19000}) {
      SCOPED_TRACE(text("equal ", equal, " budget ", budget));
      const DecodeOptions options{.select = Select::kTopK, .budget = budget};
      cuda::Decode decode(options, device.limits);
      const Device<cuda::StepRecord> records(1);
      device.poison_out();
      decode.run(device.batch, &index, nullptr, records.get());
      const StepStats stats = problem.run(options, Backend::kReference);
      const cuda::StepRecord record = records.values()[0];
      EXPECT_EQ(record.tokens_exact + record.tokens_selected, stats.tokens_certain);
      expect_near(problem, device.out(0), device.lse(0), DType::kF16);
    }
  }
}

TEST(Rank, RaggedBatchAndGraph) {
  std::vector<std::unique_ptr<Problem>> problems;
  std::vector<Problem*> pointers;
  for (const int64_t kv_len : {0, 3, 255, 2048, 5000}) {
    CacheSpec spec = spec_of(DType::kF16, 64, kv_len, 2);
    spec.seed = static_cast<uint64_t>(kv_len) + 5;
    problems.push_back(std::make_unique<Problem>(spec, 4, static_cast<uint64_t>(kv_len)));
    round_queries(*problems.back());
    pointers.push_back(problems.back().get());
  }
  DeviceBatch device(pointers, DeviceLayout::kPages16);
  cuda::LayerIndex index({}, {2, 64, 64}, 8, 16384);
  const DecodeOptions options{.select = Select::kFit, .target_mass = 0.95f};
  cuda::Decode decode(options, device.limits);
  cudaStream_t stream = nullptr;
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t executable = nullptr;
  ASSERT_EQ(cudaStreamCreate(&stream), cudaSuccess);
  ASSERT_EQ(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), cudaSuccess);
  decode.run(device.batch, &index, stream);  // nothing is clustered yet
  ASSERT_EQ(cudaStreamEndCapture(stream, &graph), cudaSuccess);
  ASSERT_EQ(cudaGraphInstantiate(&executable, graph, 0), cudaSuccess);
  for (const bool built : {false, true}) {
    for (size_t i = 0; i < pointers.size() && built; ++i) {
      pointers[i]->build_index();
      index.upload(static_cast<int32_t>(i), *pointers[i]->index, stream);
    }
    std::vector<std::vector<float>> first;
    for (int again = 0; again < 2; ++again) {
      device.poison_out();
      ASSERT_EQ(cudaGraphLaunch(executable, stream), cudaSuccess);
      ASSERT_EQ(cudaStreamSynchronize(stream), cudaSuccess);
      for (size_t i = 0; i < pointers.size(); ++i) {
        if (again == 0) {
          first.push_back(device.out(i));
        } else {
          EXPECT_TRUE(same_bits(device.out(i), first[i])) << "sequence " << i << " built " << built;
        }
        pointers[i]->run(options, Backend::kReference);
        expect_near(*pointers[i], device.out(i), device.lse(i), DType::kF16, built ? 2e-3 : 0);
      }
    }
  }
  cudaGraphExecDestroy(executable);
  cudaGraphDestroy(graph);
  cudaStreamDestroy(stream);
}

}  // namespace
}  // namespace tactic::test
