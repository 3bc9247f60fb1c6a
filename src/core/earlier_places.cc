#include "tactic/earlier_places.h"

#include <algorithm>
#include <bit>
#include <functional>
#include <string>
#include <utility>

#include "core/backend.h"
#include "core/check.h"
#include "tactic/error.h"

namespace tactic {

namespace {

constexpr int64_t kBits = 64, kFewestBits = 32;

bool same_token(uint64_t a, uint64_t b) { return std::popcount(a ^ b) <= EarlierPlaces::kDifferent; }

// Visible rows around one; -1: none.
int64_t visible_before(const std::vector<uint64_t>& visible, int64_t row) {
  auto w = static_cast<size_t>(row / 64);
  uint64_t word = visible[w] & ((uint64_t{1} << (row % 64)) - 1);
  while (word == 0 && w > 0) word = visible[--w];
  return word == 0 ? -1 : static_cast<int64_t>(w) * 64 + 63 - std::countl_zero(word);
}
int64_t visible_after(const std::vector<uint64_t>& visible, int64_t row) {
  auto w = static_cast<size_t>(row / 64);
  uint64_t word = visible[w] & (~uint64_t{1} << (row % 64));
  while (word == 0 && w + 1 < visible.size()) word = visible[++w];
  return word == 0 ? -1 : static_cast<int64_t>(w) * 64 + std::countr_zero(word);
}

}  // namespace

void EarlierPlaces::forget(int64_t row_begin, int64_t count) {
  check_row_range(row_begin, count);
  const int64_t end = std::min(row_begin + count, static_cast<int64_t>(known_.size()) * 64);
  for (int64_t row = row_begin; row < end; ++row) known_[static_cast<size_t>(row / 64)] &= ~(uint64_t{1} << (row % 64));
}

// Which of neighboring values is larger.
uint64_t EarlierPlaces::signature(const KvView& kv, int64_t row) {
  const auto word = static_cast<size_t>(row / 64);
  const uint64_t bit = uint64_t{1} << (row % 64);
  uint64_t& signature = signatures_[static_cast<size_t>(row)];
  if ((known_[word] & bit) != 0) return signature;
  const int64_t count = std::min<int64_t>(kBits, kv.v_head_dim);
  values_.resize(static_cast<size_t>(count));
  cpu::load_row(kv.v, 0, row, count, values_.data());
  signature = 0;
  for (int64_t i = 0; i < count; ++i) {
    const float next = values_[static_cast<size_t>((i + 1) % count)];
    signature |= static_cast<uint64_t>(values_[static_cast<size_t>(i)] > next) << i;
  }
  known_[word] |= bit;
  return signature;
}

void EarlierPlaces::find(const KvView& first_layer, std::span<const uint64_t> visible, std::span<const int32_t> written,
                         int32_t most, std::vector<int32_t>& rows) {
  rows.clear();
  check_values(first_layer);
  if (most < 0) throw Error("most (" + std::to_string(most) + ") must be at least 0");
  const int64_t end = first_layer.kv_len;
  const auto words = static_cast<size_t>((end + 63) / 64);
  known_.resize(words);
  if (end % 64 != 0) known_.back() &= (uint64_t{1} << (end % 64)) - 1;  // rows from kv_len on are gone
  if (most == 0 || first_layer.v_head_dim < kFewestBits || end == 0) return;
  if (visible.empty()) {
    visible_.assign(words, ~uint64_t{0});
  } else {
    visible_.assign(visible.begin(), visible.begin() + static_cast<std::ptrdiff_t>(std::min(visible.size(), words)));
    visible_.resize(words, 0);
  }
  if (end % 64 != 0) visible_.back() &= (uint64_t{1} << (end % 64)) - 1;
  signatures_.resize(words * 64);
  const auto look_again = [&](int64_t row) { known_[static_cast<size_t>(row / 64)] &= ~(uint64_t{1} << (row % 64)); };
  const auto shown = [&](int64_t row) {
    return row >= 0 && row < end && ((visible_[static_cast<size_t>(row / 64)] >> (row % 64)) & 1) != 0;
  };
  const auto newest = std::find_if(written.rbegin(), written.rend(), shown);
  const int64_t now = newest != written.rend() ? *newest : shown(end - 1) ? end - 1 : visible_before(visible_, end - 1);
  for (const int32_t row : written) {
    if (shown(row)) look_again(row);
  }
  if (now < 0) return;
  look_again(now);
  const uint64_t current = signature(first_layer, now);
  std::vector<std::pair<int, int32_t>> places;  // length of the common end, row
  size_t alone = 0;
  for (size_t w = 0; w < words; ++w) {
    for (uint64_t bits = visible_[w]; bits != 0; bits &= bits - 1) {
      const int64_t row = static_cast<int64_t>(w) * 64 + std::countr_zero(bits);
      if (row == now || !same_token(signature(first_layer, row), current)) continue;
      int length = 1;
      for (int64_t a = row, b = now; length < kLongest; ++length) {
        a = visible_before(visible_, a), b = visible_before(visible_, b);
        if (a < 0 || b < 0 || !same_token(signature(first_layer, a), signature(first_layer, b))) break;
      }
      places.emplace_back(length, static_cast<int32_t>(row));
      alone += length == 1;
    }
  }
  if (alone > kAlone) std::erase_if(places, [](const auto& place) { return place.first == 1; });
  const size_t kept = std::min(places.size(), static_cast<size_t>(most));
  std::partial_sort(places.begin(), places.begin() + static_cast<std::ptrdiff_t>(kept), places.end(), std::greater<>());
  for (size_t i = 0; i < kept; ++i) {
    rows.push_back(places[i].second);
    const auto name = [&](int count, auto next) {
      for (int64_t row = next(visible_, places[i].second); row >= 0 && count > 0; row = next(visible_, row), --count)
        rows.push_back(static_cast<int32_t>(row));
    };
    name(kBefore, visible_before);
    name(kAfter, visible_after);
  }
  std::sort(rows.begin(), rows.end());
  rows.erase(std::unique(rows.begin(), rows.end()), rows.end());
}

}  // namespace tactic
