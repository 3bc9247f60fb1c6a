// Cells of the cache that come to hold something else: seen through SET_ROWS, or behind the plug-in's back.
#include <gtest/gtest.h>

#include "llama_session.h"

namespace tactic::test {
namespace {

class RewriteScenarios : public ::testing::Test {
 protected:
  void SetUp() override {
    if (Host::get() == nullptr) GTEST_SKIP() << "TACTIC_TEST_MODEL is not set";
  }
};

constexpr llama_pos kDepth = 1536;

// What only a look-up in records(seed, 0, ..) can predict.
std::vector<llama_token> questions(uint64_t seed) {
  return tokens_of(recall(seed, 31) + recall(seed, 47) + recall(seed, 12));
}

TEST_F(RewriteScenarios, PlainDecode) {
  const auto text = tokens_of(records(1, 0, 110), kDepth), rest = questions(1);
  expect_scenario("plain decode", {}, [&](Session& s) {
    s.prefill(text);
    s.decode(rest, kDepth);
  });
}

TEST_F(RewriteScenarios, RewindAndOtherTokens) {
  const auto before = tokens_of(words(2, 2000), kDepth), after = tokens_of(records(2, 0, 110), kDepth - 128);
  const auto rest = questions(2);
  const Play play = [&](Session& s) {
    s.prefill(before);
    s.decode(std::span(rest).first(4), kDepth);
    s.scores.clear();
    ASSERT_TRUE(llama_memory_seq_rm(s.memory(), 0, 128, -1));
    s.prefill(after, 128);
    s.decode(rest, kDepth);
  };
  expect_scenario("rewind, other tokens", {}, play, {"fault=writes,fault=verify,check=0"});
}

TEST_F(RewriteScenarios, RewindTokenByToken) {
  const auto text = tokens_of(records(3, 0, 110), kDepth), other = tokens_of(words(3, 400), 160), rest = questions(3);
  const Play play = [&](Session& s) {
    s.prefill(text);
    s.decode(std::span(other).first(96), kDepth);
    ASSERT_TRUE(llama_memory_seq_rm(s.memory(), 0, kDepth - 64, -1));
    s.decode(std::span(other).last(64), kDepth - 64);
    s.decode(rest, kDepth);
  };
  expect_scenario("rewind, token by token", {}, play);
}

TEST_F(RewriteScenarios, ContextShift) {
  const auto text = tokens_of(records(4, 0, 110), kDepth), rest = tokens_of(recall(4, 61) + recall(4, 72) + recall(4, 90));
  const Play play = [&](Session& s) {
    s.prefill(text);
    s.decode(std::span(rest).first(2), kDepth);
    s.scores.clear();
    ASSERT_TRUE(llama_memory_can_shift(s.memory()));
    ASSERT_TRUE(llama_memory_seq_rm(s.memory(), 0, 64, 576));
    llama_memory_seq_add(s.memory(), 0, 576, -1, -512);
    s.decode(rest, kDepth - 512 + 2);
  };
  expect_scenario("context shift", {}, play, {"check=0,fault=verify"});
}

TEST_F(RewriteScenarios, StateRestoredOverAnotherText) {
  const auto first = tokens_of(records(5, 0, 110), kDepth), second = tokens_of(words(5, 2000), kDepth);
  const auto rest = questions(5);
  const Play play = [&](Session& s) {
    s.prefill(first);
    const std::vector<uint8_t> state = s.save();
    ASSERT_TRUE(llama_memory_seq_rm(s.memory(), 0, -1, -1));
    s.prefill(second);
    s.decode(std::span(rest).first(2), kDepth);
    s.scores.clear();
    s.restore(state);
    s.decode(rest, kDepth);
  };
  expect_scenario("state restored", {}, play, {"check=0,fault=verify"});
}

TEST_F(RewriteScenarios, StateRestoredIntoNewContext) {
  const auto text = tokens_of(records(6, 0, 110), kDepth), rest = questions(6);
  std::vector<uint8_t> state;
  {
    Session writer(kExact, {});
    writer.prefill(text);
    state = writer.save();
  }
  expect_scenario("restored into a new context", {}, [&](Session& s) {
    s.restore(state);
    s.decode(rest, kDepth);
  });
}

}  // namespace
}  // namespace tactic::test
