#include "tactic/options.h"

#include "support.h"
#include "tactic/error.h"
#include "tactic/kv_index.h"

namespace tactic::test {
namespace {

using testing::AllOf;
using testing::HasSubstr;
using testing::ThrowsMessage;

template <class Options>
void expect_rejected(const Options& options, const std::string& name, const std::string& value) {
  SCOPED_TRACE(text(name, " = ", value));
  EXPECT_THAT([&] { validate(options); }, ThrowsMessage<Error>(AllOf(HasSubstr(name), HasSubstr(value))));
}

TEST(Options, DefaultsAreValid) {
  EXPECT_NO_THROW(validate(IndexOptions{}));
  EXPECT_NO_THROW(validate(DecodeOptions{}));
}

TEST(Options, IndexOptionsOutOfRangeNameValue) {
  expect_rejected(IndexOptions{.clustering = static_cast<Clustering>(2)}, "clustering", "2");
  expect_rejected(IndexOptions{.segment_tokens = 63}, "segment_tokens", "63");
  expect_rejected(IndexOptions{.segment_tokens = 65536}, "segment_tokens", "65536");
  expect_rejected(IndexOptions{.provisional_tokens = 300}, "provisional_tokens (300)", "segment_tokens (2048)");
  expect_rejected(IndexOptions{.provisional_tokens = 8}, "provisional_tokens", "8");
  expect_rejected(IndexOptions{.segment_tokens = 128, .provisional_tokens = 256}, "provisional_tokens", "256");
  expect_rejected(IndexOptions{.cluster_tokens = -1}, "cluster_tokens", "-1");
  expect_rejected(IndexOptions{.cluster_tokens = 4096}, "cluster_tokens", "4096");
  expect_rejected(IndexOptions{.provisional_cluster_tokens = 0}, "provisional_cluster_tokens", "0");
  expect_rejected(IndexOptions{.iterations = 0}, "iterations", "0");
  expect_rejected(IndexOptions{.sink_tokens = -1}, "sink_tokens", "-1");
  expect_rejected(IndexOptions{.outlier_fraction = -0.5f}, "outlier_fraction", "-0.5");
  expect_rejected(IndexOptions{.outlier_fraction = 0.2500001f}, "outlier_fraction (0.2500001)", "in 0..0.25");
  expect_rejected(IndexOptions{.outlier_fraction = std::nanf("")}, "outlier_fraction", "nan");
}

TEST(Options, ClusterSizeFollowsTheRowsUnlessItIsGiven) {
  const auto size = [](int32_t given, int32_t head_dim, int32_t v_head_dim) {
    const KvShape shape{.num_kv_heads = 1, .head_dim = head_dim, .v_head_dim = v_head_dim};
    return KvIndex({.cluster_tokens = given}, shape).options().cluster_tokens;
  };
  EXPECT_EQ(size(0, 64, 64), 16);
  EXPECT_EQ(size(0, 128, 128), 16);
  EXPECT_EQ(size(0, 256, 240), 16);
  EXPECT_EQ(size(0, 256, 256), 9);
  EXPECT_EQ(size(0, 576, 512), 9);
  EXPECT_EQ(size(32, 256, 256), 32);
  EXPECT_EQ(size(16, 256, 256), 16);
}

TEST(Options, DecodeOptionsOutOfRangeNameValue) {
  expect_rejected(DecodeOptions{.select = static_cast<Select>(9)}, "select", "9");
  expect_rejected(DecodeOptions{.target_error = 0}, "target_error", "0");
  expect_rejected(DecodeOptions{.target_error = std::nanf("")}, "target_error", "nan");
  expect_rejected(DecodeOptions{.target_error = 1e-20f}, "target_error (1e-20)", "must be in 1e-6..1");
  expect_rejected(DecodeOptions{.tau = -1}, "tau", "-1");
  expect_rejected(DecodeOptions{.tau = 0.5f}, "tau", "0.5");
  expect_rejected(DecodeOptions{.refine = 0}, "refine", "0");
  expect_rejected(DecodeOptions{.refine = 1.5f}, "refine", "1.5");
  expect_rejected(DecodeOptions{.target_mass = -0.1f}, "target_mass", "-0.1");
  expect_rejected(DecodeOptions{.target_mass = 1.01f}, "target_mass", "1.01");
  expect_rejected(DecodeOptions{.budget = 0}, "budget", "0");
  expect_rejected(DecodeOptions{.beta = -1}, "beta", "-1");
  expect_rejected(DecodeOptions{.beta = std::nanf("")}, "beta", "nan");
}

TEST(Options, SelectNamesGoBothWays) {
  for (const Select select : {Select::kDense, Select::kSample, Select::kFit, Select::kTopK}) {
    EXPECT_EQ(select_from_name(select_name(select)), select);
  }
  EXPECT_THAT([] { select_from_name("topp"); }, ThrowsMessage<Error>(HasSubstr("topp")));
}

TEST(KvView, RowBytesOfEveryType) {
  EXPECT_EQ(row_bytes(DType::kF32, 128), 512u);
  EXPECT_EQ(row_bytes(DType::kF16, 80), 160u);
  EXPECT_EQ(row_bytes(DType::kBF16, 80), 160u);
  EXPECT_EQ(row_bytes(DType::kQ8_0, 96), 102u);
  EXPECT_EQ(row_bytes(DType::kQ4_0, 64), 36u);
  EXPECT_EQ(row_bytes(DType::kQ4_0, 0), 0u);
}

TEST(KvView, RowBytesOfWhatCannotBeAreRefused) {
  EXPECT_THAT([] { row_bytes(static_cast<DType>(9), 64); },
              ThrowsMessage<Error>(HasSubstr("dtype (9) must be in 0..5")));
  EXPECT_THAT([] { row_bytes(DType::kF32, int64_t{1} << 31); },
              ThrowsMessage<Error>(HasSubstr("elements (2147483648)")));
  EXPECT_THAT([] { row_bytes(DType::kQ8_0, 80); },
              ThrowsMessage<Error>(HasSubstr("elements (80) must be at least 0 and a multiple of 32 for q8_0")));
  EXPECT_THAT([] { row_bytes(DType::kQ4_0, 33); }, ThrowsMessage<Error>(HasSubstr("elements (33)")));
  EXPECT_THAT([] { row_bytes(DType::kF16, -1); }, ThrowsMessage<Error>(HasSubstr("elements (-1)")));
}

}  // namespace
}  // namespace tactic::test
