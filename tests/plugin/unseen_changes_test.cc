// Caches whose memory changes while the plug-in does not look.
#include "graph_layer.h"

namespace tactic::test {
namespace {

class UnseenChanges : public ::testing::Test {
 protected:
  void SetUp() override {
    Host::plugin_device();
    take_totals();
  }
};

// A layer of which 64 rows draw no attention of one query, and what is written over them to draw all of it. As no step
// reads them, no check value can tell.
struct QuietRows {
  static constexpr int64_t kBegin = 300, kCount = 64;

  QuietRows() {
    std::vector<float> keys = rows.keys(1024);
    const std::vector<float> away = toward(-3);
    std::copy(away.begin(), away.end(), keys.begin() + kBegin * kRowElements);
    layer.write(0, keys, rows.values(1024));
  }
  double error(const std::vector<float>& mask) { return layer.error(loud, mask); }
  void write_unseen() {
    const std::vector<float> k = toward(3), v = rows.values(kCount);
    const auto at = [&](ggml_tensor* cache) { return static_cast<ggml_fp16_t*>(cache->data) + kBegin * kRowElements; };
    ggml_fp32_to_fp16_row(k.data(), at(layer.k()), kCount * kRowElements);
    ggml_fp32_to_fp16_row(v.data(), at(layer.v()), kCount * kRowElements);
  }

  Layer layer{1024};
  Rows rows{17};
  const std::vector<float> visible = std::vector<float>(1024, 0.0f), loud = rows.query();

 private:
  // What all queries of a KV head turn to, or from.
  std::vector<float> toward(float factor) const {
    std::vector<float> k(kCount * kRowElements);
    for (int64_t i = 0; i < kCount * kRowElements; ++i) {
      const int64_t head = i % kRowElements / kDim, at = head * 2 * kDim + i % kDim;
      k[static_cast<size_t>(i)] = factor * (loud[static_cast<size_t>(at)] + loud[static_cast<size_t>(at + kDim)]);
    }
    return k;
  }
};

// The quiet rows are hidden for long, are written meanwhile, and come back among others that nobody touched.
double error_after_return(const std::string& mode) {
  forget_indexes();
  configure(mode);
  QuietRows quiet;
  std::vector<float> hiding = quiet.visible, others = quiet.visible;
  std::fill_n(hiding.begin() + QuietRows::kBegin, QuietRows::kCount, kHidden);
  std::fill_n(others.begin() + 700, QuietRows::kCount, kHidden);  // as many, so that nothing looks taken back
  double worst = quiet.error(others);
  for (int step = 0; step < 6; ++step) {
    worst = std::max(worst, quiet.error(hiding));
    if (step == 3) quiet.write_unseen();
  }
  for (int step = 0; step < 4; ++step) worst = std::max(worst, quiet.error(quiet.visible));
  return worst;
}

// What changed is found without reading everything; where nothing is compared, it is not.
void expect_verified(double (*error_after)(const std::string& mode)) {
  const double error = error_after(kSparse);
  const tactic_totals totals = take_totals();
  const double without = error_after(kSparse + ",fault=verify");
  std::printf("  error %.4f, unverified %.4f\n", error, without);
  EXPECT_LT(error, kBound);
  EXPECT_EQ(totals.dense_queries, 0) << "verified, not merely read whole";
  EXPECT_GT(without, kBound);
}

TEST_F(UnseenChanges, HiddenRowsThatComeBackAreVerified) { expect_verified(error_after_return); }

// While the plug-in is off the host writes, and its writes are not seen.
double error_after_off(const std::string& mode) {
  forget_indexes();
  configure(mode);
  QuietRows quiet;
  double worst = 0;
  for (int step = 0; step < 4; ++step) worst = std::max(worst, quiet.error(quiet.visible));
  configure(mode + ",select=off");
  quiet.write_unseen();
  configure(mode);
  for (int step = 0; step < 4; ++step) worst = std::max(worst, quiet.error(quiet.visible));
  return worst;
}

TEST_F(UnseenChanges, AfterItWasOffAllRowsAreVerified) { expect_verified(error_after_off); }

// State restore writes the cache behind the plug-in's back.
double error_after_unseen_change(const std::string& mode, tactic_totals& totals) {
  forget_indexes();
  configure(mode);
  Layer layer(1024);
  Rows rows(12), other(13);
  const std::vector<float> visible(1024, 0.0f);
  layer.write(0, rows.keys(1024), rows.values(1024));
  layer.attend(rows.query(), visible);
  const std::vector<float> k = other.keys(1024), v = other.values(1024);
  ggml_fp32_to_fp16_row(k.data(), static_cast<ggml_fp16_t*>(layer.k()->data), static_cast<int64_t>(k.size()));
  ggml_fp32_to_fp16_row(v.data(), static_cast<ggml_fp16_t*>(layer.v()->data), static_cast<int64_t>(v.size()));
  take_totals();
  double worst = 0;
  for (int i = 0; i < 8; ++i) worst = std::max(worst, layer.error(other.query(), visible));
  totals = take_totals();
  return worst;
}

TEST_F(UnseenChanges, AreNoticedByTheRowsRead) {
  tactic_totals totals{};
  const double error = error_after_unseen_change(kSparse, totals);
  EXPECT_LT(error, kBound);
  EXPECT_EQ(totals.changed_queries, 1) << "then the index is built anew";
  EXPECT_EQ(totals.sparse_queries, 7);
  const double without = error_after_unseen_change(kSparse + ",check=0,fault=verify", totals);
  std::printf("  unseen change: error %.4f, unchecked %.4f\n", error, without);
  EXPECT_GT(without, kBound);
}

// The host numbers the cells of a whole cache. Rows written through a part of one count as unseen.
TEST_F(UnseenChanges, RowsWrittenThroughAPartOfTheCacheAreCompared) {
  forget_indexes();
  configure(kSparse);
  constexpr int64_t kCells = 2048, kFrom = 512;
  Layer layer(kCells);
  Rows rows(33);
  std::vector<float> mask(kCells, 0.0f);
  layer.write(0, rows.keys(kCells), rows.values(kCells));
  layer.attend(rows.query(), mask);
  const std::vector<float> q = rows.query();
  std::vector<float> keys(4 * kRowElements), values(4 * kRowElements, 50.0f);
  for (size_t i = 0; i < keys.size(); ++i) keys[i] = 4 * q[i % kRowElements];
  ASSERT_EQ(layer.write_cells({88, 89, 90, 91}, keys, values, kFrom), GGML_STATUS_SUCCESS);
  EXPECT_LT(layer.error(q, mask), kBound);
  EXPECT_EQ(take_totals().sparse_queries, 2);
}

}  // namespace
}  // namespace tactic::test
