// Synthetic traces: deterministic, readable, and of the statistics they claim.
#include "synthetic.h"

#include <unistd.h>

#include <cmath>
#include <filesystem>
#include <fstream>
#include <iterator>

#include "dense_layer.h"
#include "support.h"
#include "tactic/error.h"

namespace tactic::test {
namespace {

using namespace tactic::eval;

std::string contents(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

TEST(Synthetic, PresetsHaveNames) {
  EXPECT_EQ(synthetic_preset("normed-256").head_dim, 256);
  EXPECT_THAT([] { synthetic_preset("other"); }, testing::ThrowsMessage<Error>(testing::HasSubstr("normed-128")));
}

TEST(Synthetic, NormedKeysAndHeadsFromFlatToPeaked) {
  const std::string path =
      (std::filesystem::temp_directory_path() / ("tactic_synthetic_test_" + std::to_string(getpid()))).string();
  SyntheticOptions options = synthetic_preset("normed-128");
  options.num_layers = 2;
  options.kv_len = 1200;
  options.prompt_len = 1000;
  options.queries = 4;
  options.prompt_queries = 2;
  write_synthetic(path, options);
  const std::string first = contents(path);
  write_synthetic(path, options);
  EXPECT_EQ(first, contents(path));
  const Trace trace(path);
  EXPECT_EQ(trace.info().num_queries(), 6);
  const TraceLayer layer = trace.layer(1);
  for (int32_t head = 0; head < 2; ++head) {
    const std::vector<float> rows = rows_as_f32(layer.kv.k, head, 1200, 128);
    for (size_t row = 0; row < 1200; row += 37) {
      double norm2 = 0;
      for (size_t d = 0; d < 128; ++d) norm2 += double{rows[row * 128 + d]} * rows[row * 128 + d];
      EXPECT_NEAR(std::sqrt(norm2), std::sqrt(128.0), 0.02);
    }
  }
  double least = 1e9, most = 0;  // effective number of rows, exp(entropy)
  for (const DenseQuery& answer : dense_layer(layer, std::vector<int64_t>{2, 3, 4, 5})) {
    for (int32_t h = 0; h < 8; ++h) {
      double entropy = 0;
      for (const float w : answer.head_weights(h)) entropy -= w > 0 ? double{w} * std::log(w) : 0;
      least = std::min(least, std::exp(entropy));
      most = std::max(most, std::exp(entropy));
    }
  }
  EXPECT_LT(least, 100);
  EXPECT_GT(most, 200);
  std::filesystem::remove(path);
}

}  // namespace
}  // namespace tactic::test
