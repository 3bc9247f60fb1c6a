#include "earlier_places.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <functional>
#include <utility>

#include "dtype.h"

namespace tactic::plugin {

namespace {

constexpr int64_t kBits = 64, kFewestBits = 32;

bool same_token(uint64_t a, uint64_t b) { return std::popcount(a ^ b) <= EarlierPlaces::kDifferent; }

// Visible cells around one; -1: none.
int64_t visible_before(const std::vector<uint64_t>& visible, int64_t cell) {
  auto w = static_cast<size_t>(cell / 64);
  uint64_t word = visible[w] & ((uint64_t{1} << (cell % 64)) - 1);
  while (word == 0 && w > 0) word = visible[--w];
  return word == 0 ? -1 : static_cast<int64_t>(w) * 64 + 63 - std::countl_zero(word);
}
int64_t visible_after(const std::vector<uint64_t>& visible, int64_t cell) {
  auto w = static_cast<size_t>(cell / 64);
  uint64_t word = visible[w] & (~uint64_t{1} << (cell % 64));
  while (word == 0 && w + 1 < visible.size()) word = visible[++w];
  return word == 0 ? -1 : static_cast<int64_t>(w) * 64 + std::countr_zero(word);
}

}  // namespace

void EarlierPlaces::forget(int64_t begin, int64_t count) {
  for (int64_t cell = begin; cell < begin + count; ++cell) {
    const auto word = static_cast<size_t>(cell / 64);
    if (word < known_.size()) known_[word] &= ~(uint64_t{1} << (cell % 64));
  }
}

// Which of neighboring values is larger.
uint64_t EarlierPlaces::signature(const KvView& kv, int64_t cell) {
  const auto word = static_cast<size_t>(cell / 64);
  const uint64_t bit = uint64_t{1} << (cell % 64);
  uint64_t& signature = signatures_[static_cast<size_t>(cell)];
  if ((known_[word] & bit) != 0) return signature;
  const int64_t count = std::min<int64_t>(kBits, kv.v_head_dim);
  const std::byte* row = kv.v.row(0, cell);
  values_.resize(static_cast<size_t>(count));
  if (kv.v.dtype == DType::kF32) {
    std::memcpy(values_.data(), row, values_.size() * sizeof(float));
  } else {
    ggml_get_type_traits(ggml_type_of(kv.v.dtype))->to_float(row, values_.data(), count);
  }
  signature = 0;
  for (int64_t i = 0; i < count; ++i) {
    const float next = values_[static_cast<size_t>((i + 1) % count)];
    signature |= static_cast<uint64_t>(values_[static_cast<size_t>(i)] > next) << i;
  }
  known_[word] |= bit;
  return signature;
}

void EarlierPlaces::find(const KvView& kv, const std::vector<uint64_t>& visible, const std::vector<int32_t>& written,
                         int32_t most, std::vector<int32_t>& rows) {
  rows.clear();
  if (most < 1 || kv.v_head_dim < kFewestBits || visible.empty()) return;
  const auto cells = static_cast<int64_t>(visible.size()) * 64;
  signatures_.resize(static_cast<size_t>(cells));
  known_.resize(visible.size());
  const auto shown = [&](int64_t cell) {
    return cell < cells && ((visible[static_cast<size_t>(cell / 64)] >> (cell % 64)) & 1) != 0;
  };
  const auto newest = std::find_if(written.rbegin(), written.rend(), shown);
  const int64_t now = newest != written.rend() ? *newest
                      : shown(cells - 1)       ? cells - 1
                                               : visible_before(visible, cells - 1);
  if (now < 0) return;
  const uint64_t current = signature(kv, now);
  std::vector<std::pair<int, int32_t>> places;  // length of the common end, cell
  size_t alone = 0;
  for (size_t w = 0; w < visible.size(); ++w) {
    for (uint64_t bits = visible[w]; bits != 0; bits &= bits - 1) {
      const int64_t cell = static_cast<int64_t>(w) * 64 + std::countr_zero(bits);
      if (cell == now || !same_token(signature(kv, cell), current)) continue;
      int length = 1;
      for (int64_t a = cell, b = now; length < kLongest; ++length) {
        a = visible_before(visible, a), b = visible_before(visible, b);
        if (a < 0 || b < 0 || !same_token(signature(kv, a), signature(kv, b))) break;
      }
      places.emplace_back(length, static_cast<int32_t>(cell));
      alone += length == 1;
    }
  }
  if (alone > kAlone) std::erase_if(places, [](const auto& place) { return place.first == 1; });
  const size_t kept = std::min(places.size(), static_cast<size_t>(most));
  std::partial_sort(places.begin(), places.begin() + static_cast<std::ptrdiff_t>(kept), places.end(), std::greater<>());
  for (size_t i = 0; i < kept; ++i) {
    rows.push_back(places[i].second);
    const auto name = [&](int count, auto next) {
      for (int64_t row = next(visible, places[i].second); row >= 0 && count > 0; row = next(visible, row), --count)
        rows.push_back(static_cast<int32_t>(row));
    };
    name(kBefore, visible_before);
    name(kAfter, visible_after);
  }
  std::sort(rows.begin(), rows.end());
  rows.erase(std::unique(rows.begin(), rows.end()), rows.end());
}

}  // namespace tactic::plugin
