#include "plugin_options.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tactic/error.h"

namespace tactic::plugin {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

std::string refusal(std::string_view text) {
  try {
    parse_options(text);
  } catch (const Error& error) {
    return error.what();
  }
  return {};
}

TEST(PluginOptions, EmptyTextIsThePresetHigh) {
  const PluginOptions none = parse_options(""), high = parse_options("quality=high");
  EXPECT_TRUE(none.enabled);
  EXPECT_EQ(none.decode.select, Select::kSample);
  EXPECT_EQ(none.decode.target_error, high.decode.target_error);
  EXPECT_EQ(none.min_context, 1024);
  EXPECT_EQ(none.min_sparse, 2048);
  EXPECT_FALSE(none.accept_any);
  EXPECT_FALSE(none.inspect);
}

TEST(PluginOptions, EachPresetAllowsMoreErrorThanTheOneBefore) {
  EXPECT_EQ(parse_options("quality=exact").decode.select, Select::kDense);
  float last = 0;
  for (const char* name : {"high", "balanced", "fast"}) {
    const PluginOptions options = parse_options(std::string("quality=") + name);
    EXPECT_EQ(options.decode.select, Select::kSample) << name;
    EXPECT_GT(options.decode.target_error, last) << name;
    last = options.decode.target_error;
  }
}

TEST(PluginOptions, SingleKeysOverrideThePresetWhereverItStands) {
  for (const char* text : {"quality=fast,error=0.5", "error=0.5,quality=fast"}) {
    EXPECT_EQ(parse_options(text).decode.target_error, 0.5f) << text;
  }
  EXPECT_EQ(parse_options("quality=exact,select=topk,budget=64").decode.select, Select::kTopK);
  EXPECT_EQ(parse_options("error=0.1,error=0.2").decode.target_error, 0.2f) << "the last one counts";
}

TEST(PluginOptions, KeysReachTheirFields) {
  const PluginOptions o = parse_options(
      "select=fit,mass=0.8,budget=99,check=0,seed=7,sinks=5,segment=512,provisional=64,clustering=whole,"
      "min_context=0,max_rows=3,places=5,accept=any,inspect=1,fault=mask,fault=verify");
  EXPECT_EQ(o.decode.select, Select::kFit);
  EXPECT_EQ(o.decode.target_mass, 0.8f);
  EXPECT_EQ(o.decode.budget, 99);
  EXPECT_FALSE(o.decode.check_rows);
  EXPECT_EQ(o.decode.seed, 7u);
  EXPECT_EQ(o.index.seed, 7u);
  EXPECT_EQ(o.index.sink_tokens, 5);
  EXPECT_EQ(o.index.segment_tokens, 512);
  EXPECT_EQ(o.index.provisional_tokens, 64);
  EXPECT_EQ(o.index.clustering, Clustering::kWhole);
  EXPECT_EQ(o.min_context, 0);
  EXPECT_EQ(o.min_sparse, 0) << "whoever asks for it gets it";
  EXPECT_EQ(parse_options("min_sparse=0").min_sparse, 1024) << "below min_context nothing is selected";
  EXPECT_EQ(parse_options("min_context=300,min_sparse=600").min_context, 300);
  EXPECT_EQ(parse_options("min_context=300,min_sparse=600").min_sparse, 600);
  EXPECT_EQ(o.max_rows, 3);
  EXPECT_EQ(o.places, 5);
  EXPECT_TRUE(o.accept_any);
  EXPECT_TRUE(o.inspect);
  EXPECT_TRUE(o.faults.ignore_mask);
  EXPECT_TRUE(o.faults.skip_verify);
  EXPECT_FALSE(o.faults.ignore_writes);
}

TEST(PluginOptions, TauStandsBesideAPresetButNotBesideAnError) {
  EXPECT_EQ(parse_options("tau=3").decode.tau, 3.0f);
  EXPECT_EQ(parse_options("quality=high,tau=3").decode.tau, 3.0f);
  EXPECT_EQ(parse_options("tau=3,quality=fast").decode.tau, 3.0f);
  for (const char* text : {"tau=3,error=0.01", "error=0.01,tau=3", "error=0.01,quality=fast,tau=0"}) {
    EXPECT_THAT(refusal(text), AllOf(HasSubstr("error=0.01 and tau="), HasSubstr("give one"))) << text;
  }
}

TEST(PluginOptions, OffTakesNothing) {
  EXPECT_FALSE(parse_options("select=off").enabled);
  EXPECT_TRUE(parse_options("select=dense").enabled);
  EXPECT_TRUE(parse_options("select=off,select=topk").enabled) << "the last one counts";
  EXPECT_FALSE(parse_options("select=topk,select=off").enabled);
}

TEST(PluginOptions, SeparatorsWithoutItemsAreHarmless) {
  EXPECT_EQ(parse_options(",,error=0.5,").decode.target_error, 0.5f);
  EXPECT_EQ(parse_options(" , error = 0.5 ,\t").decode.target_error, 0.5f);
}

TEST(PluginOptions, MisspelledKeyListsTheKeys) {
  EXPECT_THAT(refusal("eror=0.1"), AllOf(HasSubstr("\"eror\""), HasSubstr("quality"), HasSubstr("error"),
                                         HasSubstr("min_context"), HasSubstr("select")));
  EXPECT_THAT(refusal("=1"), HasSubstr("unknown key"));
  EXPECT_THAT(refusal("select"), AllOf(HasSubstr("select"), HasSubstr("key=value")));
}

TEST(PluginOptions, WrongWordsNameTheValueAndWhatIsAllowed) {
  EXPECT_THAT(refusal("quality=hihg"), AllOf(HasSubstr("hihg"), HasSubstr("balanced")));
  EXPECT_THAT(refusal("select=smaple"), AllOf(HasSubstr("smaple"), HasSubstr("sample")));
  EXPECT_THAT(refusal("clustering=partly"), AllOf(HasSubstr("partly"), HasSubstr("incremental")));
  EXPECT_THAT(refusal("fault=all"), AllOf(HasSubstr("all"), HasSubstr("writes")));
  EXPECT_THAT(refusal("check=yes"), AllOf(HasSubstr("yes"), HasSubstr("0 or 1")));
  EXPECT_THAT(refusal("accept=some"), HasSubstr("any"));
}

TEST(PluginOptions, JunkIsNoNumber) {
  for (const char* text : {"error=", "error=0.1x", "error=x", "error=0 .1", "budget=1.5", "budget=--1", "seed=-1",
                           "max_rows=0x4", "min_context=99999999999", "segment=1e3", "error=0,1"}) {
    EXPECT_NE(refusal(text), "") << text;
  }
  for (const char* text :
       {"error=nan", "error=inf", "error=-inf", "tau=nan", "beta=nan", "mass=nan", "refine=nan", "outliers=nan"}) {
    EXPECT_NE(refusal(text), "") << text;
  }
}

TEST(PluginOptions, OutOfRangeIsRefused) {
  for (const char* text : {"max_rows=0",    "max_rows=65",   "places=-1",     "places=65",       "min_context=-1",
                           "error=-0.1",    "error=0",       "mass=-0.1",     "mass=1.1",        "budget=-1",
                           "sinks=-1",      "segment=0",     "provisional=0", "provisional=100", "cluster=-1",
                           "iterations=-1", "outliers=-0.1", "outliers=1.5",  "beta=-1",         "tau=-1"}) {
    EXPECT_NE(refusal(text), "") << text;
  }
  EXPECT_THAT(refusal("max_rows=65"), AllOf(HasSubstr("max_rows=65"), HasSubstr("1..64")));
  EXPECT_THAT(refusal("min_sparse=3000000000"), HasSubstr("in 0..1073741824"));
  EXPECT_THAT(refusal("budget=99999999999"), AllOf(HasSubstr("budget=99999999999"), HasSubstr("at most 2147483647")));
  EXPECT_THAT(refusal("budget=-99999999999"), HasSubstr("at least 0"));
  EXPECT_THAT(refusal("seed=-1"), HasSubstr("from 0 on"));
}

}  // namespace
}  // namespace tactic::plugin
