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

constexpr llama_pos kDepth = 576;

// What only a look-up in records(seed, 0, ...) can predict.
std::vector<llama_token> questions(uint64_t seed) {
  return tokens_of(recall(seed, 21) + recall(seed, 33) + recall(seed, 12));
}

Play prefill_and_decode(const std::vector<llama_token>& text, const std::vector<llama_token>& rest) {
  return [=](Session& s) {
    s.prefill(text);
    s.decode(rest, static_cast<llama_pos>(text.size()));
  };
}

TEST_F(RewriteScenarios, PlainDecode) {
  expect_scenario(
      {.name = "plain decode", .play = prefill_and_decode(tokens_of(records(1, 0, 60), kDepth), questions(1))});
}

TEST_F(RewriteScenarios, RewindAndOtherTokens) {
  const auto before = tokens_of(words(2, 1000), kDepth), after = tokens_of(records(2, 0, 60), kDepth - 64);
  const auto rest = questions(2);
  const Play play = [&](Session& s) {
    s.prefill(before);
    s.decode(std::span(rest).first(4), kDepth);
    s.scores.clear();
    ASSERT_TRUE(llama_memory_seq_rm(s.memory(), 0, 64, -1));
    s.prefill(after, 64);
    s.decode(rest, kDepth);
  };
  auto text = before;
  std::copy(after.begin(), after.end(), text.begin() + 64);
  expect_scenario({.name = "rewind, other tokens",
                   .play = play,
                   .exact_play = prefill_and_decode(text, rest),
                   .faults = {"fault=writes,fault=verify,check=0"}});
}

// A rejected draft: the new tokens come one by one, and the cells behind them still hold the old ones.
TEST_F(RewriteScenarios, RewindTokenByToken) {
  const auto text = tokens_of(records(3, 0, 60), kDepth), other = tokens_of(words(3, 200), 64), rest = questions(3);
  const Play play = [&](Session& s) {
    s.prefill(text);
    ASSERT_TRUE(llama_memory_seq_rm(s.memory(), 0, kDepth - 64, -1));
    s.decode(other, kDepth - 64);
    s.scores.clear();
    s.decode(rest, kDepth);
  };
  auto final_text = text;
  std::copy(other.begin(), other.end(), final_text.end() - 64);
  expect_scenario({.name = "rewind, token by token", .play = play, .exact_play = prefill_and_decode(final_text, rest)});
}

// What a request taught is not carried into the next one.
TEST_F(RewriteScenarios, WhatIsAskedAgainIsAnsweredAlike) {
  const auto text = tokens_of(records(8, 0, 60), kDepth), long_answer = tokens_of(words(8, 300), 96);
  for (const size_t length : {size_t{96}, size_t{1}}) {
    const auto rest = std::span(long_answer).first(length);
    const Outcome asked = run(kSparse, {}, [&](Session& s) {
      s.prefill(text);
      for (int time = 0; time < 3; ++time) {
        ASSERT_TRUE(llama_memory_seq_rm(s.memory(), 0, kDepth, -1));
        s.decode(rest, kDepth);
      }
    });
    EXPECT_GT(asked.totals.sparse_queries, 0);
    ASSERT_EQ(asked.scores.size(), 3 * length);
    for (size_t i = 0; i < length; ++i) {  // the first time the prompt is not all clustered yet
      ASSERT_EQ(asked.scores[length + i], asked.scores[2 * length + i]) << "token " << i << " of " << length;
    }
  }
}

// Removed cells keep their rows: only the mask hides them.
TEST_F(RewriteScenarios, RemovedCellsAreNotRead) {
  const auto text = tokens_of(words(7, 1000), kDepth), rest = questions(7);
  const Play play = [&](Session& s) {
    s.prefill(text);
    ASSERT_TRUE(llama_memory_seq_rm(s.memory(), 0, kDepth - 192, -1));
    s.decode(rest, kDepth - 192);
  };
  auto start = text;
  start.resize(kDepth - 192);
  Scenario scenario{.name = "removed cells", .play = play, .exact_play = prefill_and_decode(start, rest)};
  if (!on_gpu()) scenario.faults = {"fault=mask"};  // there a step knows no more of a mask than how many rows it shows
  expect_scenario(scenario);
}

TEST_F(RewriteScenarios, ContextShift) {
  TACTIC_SKIP_ON_GPU("tokens that fill a gap between others are left to llama.cpp");
  constexpr llama_pos kLong = 768, kShift = 256;
  const auto text = tokens_of(records(4, 0, 60), kLong);
  const auto rest = tokens_of(recall(4, 35) + recall(4, 40) + recall(4, 44));
  const Play play = [&](Session& s) {
    s.prefill(text);
    s.decode(std::span(rest).first(2), kLong);
    s.scores.clear();
    ASSERT_TRUE(llama_memory_can_shift(s.memory()));
    ASSERT_TRUE(llama_memory_seq_rm(s.memory(), 0, 16, 16 + kShift));
    llama_memory_seq_add(s.memory(), 0, 16 + kShift, -1, -kShift);
    s.decode(rest, kLong - kShift + 2);
  };
  const Outcome exact = run(kExact, {}, play);
  expect_close("context shift", exact, run(kSparse, {}, play), {.mean = 0.004, .max = 0.04});
  // Sampling hardly shows that the safeguard is missing: its weights make good for estimates of rows that are elsewhere
  // by now. A fixed number of the best clusters does.
  const std::string topk = kIndexOptions + ",select=topk,budget=96";
  const Bound bound{.mean = 0.0125, .max = 0.25};
  expect_close("  topk", exact, run(topk, {}, play), bound);
  const Divergence stale = divergence(exact, run(topk + ",check=0,fault=verify", {}, play));
  std::printf("  %-34s KL mean %.5f max %.4f\n", "  topk with check=0,fault=verify", stale.mean, stale.max);
  EXPECT_GT(stale.mean, bound.mean);
  EXPECT_GT(stale.max, bound.max);
}

TEST_F(RewriteScenarios, StateRestoredOverAnotherText) {
  const auto first = tokens_of(records(5, 0, 60), kDepth), second = tokens_of(words(5, 1000), kDepth);
  const auto rest = questions(5);
  std::vector<uint8_t> state;
  const Outcome exact = run(kExact, {}, [&](Session& s) {
    s.prefill(first);
    state = s.save();
    s.decode(rest, kDepth);
  });
  const Play play = [&](Session& s) {
    s.prefill(second);
    s.decode(std::span(rest).first(2), kDepth);
    s.scores.clear();
    s.restore(state);
    s.decode(rest, kDepth);
  };
  expect_scenario({.name = "state restored", .play = play, .faults = {"check=0,fault=verify"}}, exact);
  expect_scenario({.name = "restored into a new context",
                   .play =
                       [&](Session& s) {
                         s.restore(state);
                         s.decode(rest, kDepth);
                       }},
                  exact);
}

}  // namespace
}  // namespace tactic::test
