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
  known_[word] |= bit;
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
  return signature;
}

void EarlierPlaces::find(const KvView& kv, const std::vector<uint64_t>& visible, int32_t most,
                         std::vector<int32_t>& rows) {
  rows.clear();
  if (most < 1 || kv.v_head_dim < kFewestBits) return;
  signatures_.resize(static_cast<size_t>(kv.kv_len));
  known_.resize(static_cast<size_t>((kv.kv_len + 63) / 64));
  size_t last = std::min(visible.size(), known_.size());
  while (last > 0 && visible[last - 1] == 0) --last;
  if (last == 0) return;
  const int64_t now = static_cast<int64_t>(last) * 64 - 1 - std::countl_zero(visible[last - 1]);
  if (now >= kv.kv_len) return;
  const uint64_t current = signature(kv, now);
  std::vector<std::pair<int, int32_t>> places;  // length of the common end, cell
  size_t alone = 0;
  for (size_t w = 0; w < last; ++w) {
    for (uint64_t bits = visible[w]; bits != 0; bits &= bits - 1) {
      const int64_t cell = static_cast<int64_t>(w) * 64 + std::countr_zero(bits);
      if (cell >= now || !same_token(signature(kv, cell), current)) continue;
      int length = 1;
      while (length < kLongest && cell >= length &&
             same_token(signature(kv, cell - length), signature(kv, now - length)))
        ++length;
      places.emplace_back(length, static_cast<int32_t>(cell));
      alone += length == 1;
    }
  }
  if (alone > kAlone) std::erase_if(places, [](const auto& place) { return place.first == 1; });
  const size_t kept = std::min(places.size(), static_cast<size_t>(most));
  std::partial_sort(places.begin(), places.begin() + static_cast<std::ptrdiff_t>(kept), places.end(), std::greater<>());
  for (size_t i = 0; i < kept; ++i) {
    for (int32_t row = std::max(0, places[i].second - kBefore); row <= places[i].second + kAfter; ++row)
      rows.push_back(row);
  }
  std::sort(rows.begin(), rows.end());
  rows.erase(std::unique(rows.begin(), rows.end()), rows.end());
}

}  // namespace tactic::plugin
