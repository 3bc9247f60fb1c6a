#include "tactic/earlier_places.h"

#include <algorithm>
#include <map>
#include <random>

#include "support.h"

namespace tactic::test {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

using Rows = std::vector<int32_t>;

// The rows named of these places.
Rows around(const std::vector<int32_t>& places) {
  Rows rows;
  for (const int32_t place : places) {
    for (int32_t row = place - EarlierPlaces::kBefore; row <= place + EarlierPlaces::kAfter; ++row) {
      if (row >= 0 && (rows.empty() || row > rows.back())) rows.push_back(row);
    }
  }
  return rows;
}

// A cache of one head that holds the values of a text's tokens, each rounded a little differently.
class Text {
 public:
  explicit Text(int64_t rows, DType dtype = DType::kF16, int32_t dim = 64, Layout layout = Layout::kTokenMajor)
      : dim_(dim),
        cache_(
            {.v_dtype = dtype, .layout = layout, .num_kv_heads = 1, .head_dim = 64, .v_head_dim = dim, .kv_len = rows}),
        visible_(static_cast<size_t>((rows + 63) / 64)) {}
  void set(int64_t row, int token) {
    std::vector<float>& values = tokens_[token];
    while (values.size() < static_cast<size_t>(dim_)) values.push_back(normal_(random_));
    std::vector<float> rounded = values;
    for (float& x : rounded) x *= 1 + 0.0005f * normal_(random_);
    cache_.set_value(0, row, rounded);
    show(row, true);
  }
  void append(const std::vector<int>& tokens) {
    for (const int token : tokens) set(size_++, token);
  }
  void append_others(int64_t count) {  // each like no other
    for (int64_t i = 0; i < count; ++i) set(size_++, next_other_++);
  }
  void show(int64_t row, bool shown) {
    uint64_t& word = visible_[static_cast<size_t>(row / 64)];
    const uint64_t bit = uint64_t{1} << (row % 64);
    word = shown ? word | bit : word & ~bit;
  }
  Rows find(int32_t most = 8) {
    Rows rows;
    earlier_places.find(cache_.view(), visible_, written, most, rows);
    return rows;
  }
  KvView view() const { return cache_.view(); }
  int32_t size() const { return static_cast<int32_t>(size_); }

  EarlierPlaces earlier_places;
  std::vector<int32_t> written;

 private:
  int32_t dim_;
  Cache cache_;
  std::vector<uint64_t> visible_;
  std::map<int, std::vector<float>> tokens_;
  std::mt19937_64 random_{1};
  std::normal_distribution<float> normal_;
  int64_t size_ = 0;
  int next_other_ = 1000;
};

TEST(EarlierPlaces, AreWhereTheTextStoodAsItStandsNow) {
  for (const DType dtype : {DType::kF32, DType::kF16, DType::kBF16, DType::kQ8_0, DType::kQ4_0}) {
    SCOPED_TRACE(dtype_name(dtype));
    Text text(300, dtype, 64, dtype == DType::kF16 ? Layout::kPaged : Layout::kPadded);
    text.append_others(70);
    text.append({1, 2, 3, 4});
    text.append_others(90);
    text.append({9, 3});
    text.append_others(40);
    EXPECT_EQ(text.find(), Rows{});
    text.append({1, 2, 3});
    EXPECT_EQ(text.find(), around({72, 165}));
    text.append({4});
    EXPECT_EQ(text.find(), around({73}));
  }
}

TEST(EarlierPlaces, ATokenThatStandsEverywhereSaysNothingAlone) {
  Text text(600);
  text.append({7, 8, 1});
  for (size_t i = 0; i <= EarlierPlaces::kAlone; ++i) text.append_others(9), text.append({1});
  text.append_others(5);
  text.append({1});
  EXPECT_EQ(text.find(), Rows{});
  text.append_others(5);
  text.append({8, 1});
  EXPECT_EQ(text.find(), around({2})) << "the two before it say more";
}

TEST(EarlierPlaces, AreFewTheLongestAndTheLatest) {
  Text text(600);
  text.append({5, 1, 2, 3});
  std::vector<int32_t> expected{3};
  for (int i = 0; i < 12; ++i) {
    text.append_others(6);
    text.append({1, 2, 3});
    if (i >= 5) expected.push_back(text.size() - 1);
  }
  text.append_others(6);
  text.append({5, 1, 2, 3});
  EXPECT_EQ(text.find(), around(expected));
  EXPECT_EQ(text.find(1), around({3}));
  EXPECT_EQ(text.find(0), Rows{});
}

// Its last token stood in row 0 before.
Text repeated() {
  Text text(200);
  text.append({1, 2});
  text.append_others(100);
  text.append({1});
  EXPECT_EQ(text.find(), around({0}));
  return text;
}

TEST(EarlierPlaces, HiddenRowsAreNoPlaces) {
  Text text = repeated();
  text.show(0, false);
  EXPECT_EQ(text.find(), Rows{});
}

TEST(EarlierPlaces, TheNewestRowIsTheOneWrittenLast) {
  Text text(300);
  text.append_others(20);
  text.append({1, 2, 3});
  text.append_others(77);
  for (int64_t row = 40; row < 60; ++row) text.show(row, false);
  text.set(40, 1);  // into a hole
  text.set(41, 2);
  EXPECT_EQ(text.find(), Rows{}) << "the last visible one is like no other";
  text.written = {40, 41};
  EXPECT_EQ(text.find(), around({21}));
  text.written = {41, 45};  // 45 is hidden
  EXPECT_EQ(text.find(), around({21}));
}

TEST(EarlierPlaces, TextGoesFromVisibleRowToVisibleRow) {
  Text text(400);
  for (size_t i = 0; i <= EarlierPlaces::kAlone; ++i) text.append_others(3), text.append({3});
  text.append({1});
  const int32_t place = text.size() + 1;
  for (const int token : {2, 3, 4}) {  // of two sequences in turn
    text.append_others(1);
    text.show(text.size() - 1, false);
    text.append({token});
  }
  text.append_others(30);
  text.append({1, 2});
  EXPECT_EQ(text.find(), (Rows{place - 2, place, place + 2, place + 4}));
  text.append({3});
  EXPECT_EQ(text.find(), (Rows{place, place + 2, place + 4, place + 5}));
}

TEST(EarlierPlaces, WrittenRowsAreLookedAtAgain) {
  Text text = repeated();
  text.set(0, 3);
  text.set(50, 1);
  EXPECT_EQ(text.find(), around({0})) << "nobody said that it was written";
  text.earlier_places.forget(0, 1);
  EXPECT_EQ(text.find(), Rows{});
  text.earlier_places.forget_all();
  EXPECT_EQ(text.find(), around({50}));
}

// A draft that was rejected: nobody calls forget().
TEST(EarlierPlaces, RewrittenNewestRowsAreLookedAtAgain) {
  Text text(64);
  for (int token = 0; token < 10; ++token) text.append({token});
  const auto find = [&](int64_t kv_len, const std::vector<int32_t>& written = {}, int32_t most = 8) {
    KvView kv = text.view();
    kv.kv_len = kv_len;
    Rows rows;
    text.earlier_places.find(kv, {}, written, most, rows);
    return rows;
  };
  text.set(8, 3);  // 0 .. 7, 3, 9
  text.set(10, 3);
  EXPECT_EQ(find(11), around({3, 8}));
  text.set(10, 7);
  EXPECT_EQ(find(11), around({7})) << "the newest row may always be another";
  text.set(10, 2);
  text.set(11, 3);
  EXPECT_EQ(find(12, {10, 11}, 1), around({3})) << "2, 3 stood there before; row 10 is no 7 any more";
  text.set(8, 6);  // 0 .. 7, 6, 9
  text.earlier_places.forget(8, 1);
  text.set(10, 7);
  EXPECT_EQ(find(11), around({7}));
  EXPECT_EQ(find(10), Rows{}) << "rewound";
  text.set(10, 5);
  text.set(11, 6);
  EXPECT_EQ(find(12, {}, 1), around({6})) << "5, 6 stood there before; the 7 of row 10 is gone";
  text.set(8, 6);
  text.earlier_places.forget(8, 1);
  EXPECT_EQ(find(12), around({6, 8}));
  text.set(8, 20);
  EXPECT_EQ(find(0), Rows{});
  EXPECT_EQ(find(12), around({6})) << "no row was left";
}

TEST(EarlierPlaces, NeedEnoughValuesAndARow) {
  Text few(100, DType::kF16, 16), empty(100);
  few.append({1, 2});
  few.append_others(20);
  few.append({1});
  EXPECT_EQ(few.find(), Rows{}) << "so short rows tell no tokens apart";
  EXPECT_EQ(empty.find(), Rows{});
}

TEST(EarlierPlaces, WithoutBitsAllRowsAreVisible) {
  Text text(103);
  text.append({1, 2});
  text.append_others(100);
  text.append({1});
  Rows rows;
  text.earlier_places.find(text.view(), {}, {}, 8, rows);
  EXPECT_EQ(rows, around({0}));
  KvView shorter = text.view();
  shorter.kv_len = 2;  // rows past it are not there, whatever the bits say
  text.earlier_places.find(shorter, std::vector<uint64_t>{~uint64_t{0}}, std::vector<int32_t>{102, -1}, 8, rows);
  EXPECT_EQ(rows, Rows{});
  text.append_others(0);
  shorter.kv_len = 0;
  text.earlier_places.find(shorter, {}, {}, 8, rows);
  EXPECT_EQ(rows, Rows{});
}

TEST(EarlierPlaces, SayWhatCannotBeRead) {
  Text text(100);
  Rows rows{1};
  KvView kv = text.view();
  kv.k = {};  // is not read
  text.earlier_places.find(kv, {}, {}, 8, rows);
  EXPECT_EQ(rows, Rows{});
  EXPECT_THAT(message_of([&] { text.earlier_places.find(kv, {}, {}, -1, rows); }),
              AllOf(HasSubstr("most (-1)"), HasSubstr("at least 0")));
  kv.v.token_stride_bytes = 2;
  EXPECT_THAT(message_of([&] { text.earlier_places.find(kv, {}, {}, 8, rows); }),
              AllOf(HasSubstr("V token_stride_bytes (2)"), HasSubstr("128")));
  kv.v.data = nullptr;
  EXPECT_THAT(message_of([&] { text.earlier_places.find(kv, {}, {}, 8, rows); }),
              AllOf(HasSubstr("V data"), HasSubstr("null")));
  EXPECT_THAT(message_of([&] { text.earlier_places.forget(-1, 2); }),
              AllOf(HasSubstr("-1 + 2"), HasSubstr("0..2^31-1")));
  text.earlier_places.forget(0, INT32_MAX);  // more than it knows
}

}  // namespace
}  // namespace tactic::test
