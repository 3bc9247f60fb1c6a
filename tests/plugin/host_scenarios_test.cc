// What the host decides and what it is told: flash attention left at 'auto', options, totals.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "llama_session.h"

namespace tactic::test {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

class HostScenarios : public ::testing::Test {
 protected:
  void SetUp() override {
    if (Host::get() == nullptr) GTEST_SKIP() << "TACTIC_TEST_MODEL is not set";
    forget_indexes();
  }
};

constexpr llama_pos kDepth = 384;
const std::vector<llama_token>& text() {
  static const std::vector<llama_token> tokens = tokens_of(records(1, 0, 40), kDepth);
  return tokens;
}

// llama.cpp asks a new context which device takes its attention and switches flash attention off if that is not the
// layer's. Then no attention node would ever come.
TEST_F(HostScenarios, FlashAttentionAutoStaysOn) {
  std::unique_ptr<Session> kept;
  for (const std::string which : {"first", "second, beside the first", "third, after the others"}) {
    if (which.starts_with("third")) kept.reset();
    take_log();
    auto session = std::make_unique<Session>(kSparse, SessionOptions{.cells = 512});
    const std::string log = take_log();
    EXPECT_THAT(log, HasSubstr("Flash Attention enabled")) << which;
    EXPECT_THAT(log, ::testing::Not(HasSubstr("set to disabled"))) << which;
    take_totals();
    session->prefill(text());
    session->decode(std::span(text()).first(4), kDepth);
    EXPECT_GT(take_totals().sparse_queries, 0) << which << " context";
    if (which == "first") kept = std::move(session);
  }
}

TEST_F(HostScenarios, WrongOptionsLeaveTheOldOnes) {
  Session session(kExact, {.cells = 512});
  session.prefill(text());
  EXPECT_THAT(try_configure("min_context=0,select=sampel"), AllOf(HasSubstr("sampel"), HasSubstr("sample")));
  EXPECT_THAT(try_configure("error=0.01,budgte=3"), AllOf(HasSubstr("budgte"), HasSubstr("budget")));
  EXPECT_NE(try_configure("error=-1"), "");
  take_totals();
  llama_token token = text()[0];
  ASSERT_EQ(llama_decode(session.context(), llama_batch_get_one(&token, 1)), 0);  // no configure in between
  llama_synchronize(session.context());
  const tactic_totals totals = take_totals();
  EXPECT_EQ(totals.queries, Host::get()->num_layers());
  EXPECT_EQ(totals.dense_queries, totals.queries);
}

TEST_F(HostScenarios, OffLeavesAllAttentionToTheHost) {
  Session session("select=off", {.cells = 512});
  session.prefill(text());
  session.decode(std::span(text()).first(4), kDepth);
  const tactic_totals totals = take_totals();
  EXPECT_EQ(totals.nodes, 0);
  EXPECT_EQ(totals.write_ns, 0) << "nor are rows stored here";
}

TEST_F(HostScenarios, ShortContextsAreTheHosts) {
  TACTIC_SKIP_ON_GPU("short contexts are left to llama.cpp");
  Session session("min_context=512", {.cells = 1024});
  take_totals();
  session.prefill(std::span(text()).first(200));
  session.decode(std::span(text()).subspan(200, 20), 200);
  EXPECT_EQ(take_totals().nodes, 0) << "256 padded cells";
  session.prefill(std::span(text()).subspan(220), 220);
  session.decode(std::span(text()).first(2), kDepth);
  EXPECT_EQ(take_totals().nodes, 2 * Host::get()->num_layers()) << "512 padded cells";
}

TEST_F(HostScenarios, FewRowsAreReadExactly) {
  TACTIC_SKIP_ON_GPU("short contexts are left to llama.cpp");
  const int64_t few = kDepth + 4;
  Session session(kSparse + ",min_sparse=" + std::to_string(few), {.cells = 512});
  session.prefill(text());
  take_totals();
  session.decode(std::span(text()).first(3), kDepth);
  const tactic_totals below = take_totals();
  EXPECT_EQ(below.queries, 3 * Host::get()->num_layers());
  EXPECT_EQ(below.dense_queries, below.queries);
  session.decode(std::span(text()).first(2), kDepth + 3);
  EXPECT_EQ(take_totals().dense_queries, 0) << few << " rows are seen";
}

TEST_F(HostScenarios, TotalsAreConsistent) {
  TACTIC_SKIP_ON_GPU("times are not measured, and rows are stored by llama.cpp");
  const int64_t layers = Host::get()->num_layers(), kv_heads = Host::get()->num_kv_heads(), steps = 10;
  Session session(kSparse, {.cells = 512});
  session.prefill(text());
  take_totals();
  session.decode(std::span(text()).first(steps), kDepth);
  const tactic_totals t = take_totals();
  EXPECT_EQ(t.nodes, layers * steps);
  EXPECT_EQ(t.queries, t.nodes);
  EXPECT_EQ(t.kv_heads, t.queries * kv_heads);
  EXPECT_EQ(t.sparse_queries + t.dense_queries, t.queries);
  EXPECT_EQ(t.sparse_queries, t.queries);
  EXPECT_EQ(t.changed_queries, 0);
  // f16 rows of 64 elements, K and V; at step i kDepth + i + 1 of them.
  EXPECT_EQ(t.kv_bytes_present, layers * kv_heads * 256 * (kDepth * steps + steps * (steps + 1) / 2));
  EXPECT_GT(t.kv_bytes, 0);
  EXPECT_GT(t.index_bytes, 0);
  EXPECT_LT(t.kv_bytes + t.index_bytes, t.kv_bytes_present);
  EXPECT_GT(t.tokens_certain, 0);
  EXPECT_LE((t.tokens_certain + t.tokens_sampled) * 256, t.kv_bytes_present);
  EXPECT_LE(t.tokens_value, t.tokens_certain + t.tokens_sampled);
  EXPECT_GT(t.estimated_mass, 0);
  EXPECT_LE(t.estimated_mass, static_cast<double>(t.sparse_queries) * (1 + 1e-6));
  EXPECT_GT(t.attend_ns, 0);
  EXPECT_GT(t.write_ns, 0);
  EXPECT_GT(t.index_memory_bytes, 0);
  EXPECT_EQ(t.kv_memory_bytes, layers * kv_heads * 256 * (kDepth + steps));
  const tactic_totals again = take_totals();
  EXPECT_EQ(again.nodes, 0);
  EXPECT_EQ(again.kv_bytes, 0);
  EXPECT_EQ(again.attend_ns, 0);
  EXPECT_EQ(again.index_memory_bytes, t.index_memory_bytes) << "what is held now, not a sum";
}

TEST_F(HostScenarios, SameStepsGiveSameBits) {
  const auto play = [&] {
    return run(kSparse, {.cells = 512}, [&](Session& s) {
      s.prefill(text());
      s.decode(std::span(text()).first(8), kDepth);
    });
  };
  const Outcome first = play(), second = play();
  EXPECT_EQ(first.scores, second.scores);
}

}  // namespace
}  // namespace tactic::test
