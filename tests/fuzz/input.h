// The bytes of a fuzzer's input as numbers. What lies beyond the end is zero.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string_view>

namespace tactic::fuzz {

class Input {
 public:
  Input(const uint8_t* data, size_t size) : data_(data), size_(size) {}

  bool empty() const { return size_ == 0; }

  /// Any value of the type, NaN included.
  template <class T>
  T raw() {
    T value{};
    const size_t bytes = size_ < sizeof value ? size_ : sizeof value;
    if (bytes > 0) std::memcpy(&value, data_, bytes);
    data_ += bytes;
    size_ -= bytes;
    return value;
  }
  /// In [low, high]; one byte where that is enough.
  int64_t within(int64_t low, int64_t high) {
    const auto span = static_cast<uint64_t>(high - low) + 1;
    return low + static_cast<int64_t>((span <= 256 ? raw<uint8_t>() : raw<uint32_t>()) % span);
  }
  bool one_in(int64_t n) { return within(1, n) == n; }

  template <class T, size_t N>
  T pick(const T (&values)[N]) {
    return values[within(0, static_cast<int64_t>(N) - 1)];
  }
  std::string_view rest() {
    const std::string_view all(reinterpret_cast<const char*>(data_), size_);
    size_ = 0;
    return all;
  }

 private:
  const uint8_t* data_;
  size_t size_;
};

/// A property that does not hold ends the process, as a sanitizer's finding does.
void require(bool holds, const char* what);

}  // namespace tactic::fuzz
