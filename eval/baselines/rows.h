// K and V of one layer as floats, decoded once: what every evaluation reads instead of the stored rows.
#pragma once

#include <cstdint>
#include <vector>

#include "tactic/kv_view.h"

namespace tactic::eval {

float dot(const float* a, const float* b, int32_t n);
/// sum += weight * x
void add_scaled(float weight, const float* x, float* sum, int32_t n);

class Rows {
 public:
  /// Decodes rows [size(), kv.kv_len). The rows before must not have changed.
  void extend(const KvView& kv);

  int64_t size() const { return size_; }
  int32_t num_kv_heads() const { return static_cast<int32_t>(k_.size()); }
  int32_t head_dim() const { return head_dim_; }
  int32_t v_head_dim() const { return v_head_dim_; }
  /// As stored, of one row and head.
  int64_t k_bytes() const { return k_bytes_; }
  int64_t v_bytes() const { return v_bytes_; }
  const float* k(int32_t head, int64_t row) const { return k_[static_cast<size_t>(head)].data() + row * head_dim_; }
  const float* v(int32_t head, int64_t row) const { return v_[static_cast<size_t>(head)].data() + row * v_head_dim_; }

 private:
  std::vector<std::vector<float>> k_, v_;  // [num_kv_heads][size, dim]
  int64_t size_ = 0, k_bytes_ = 0, v_bytes_ = 0;
  int32_t head_dim_ = 0, v_head_dim_ = 0;
};

}  // namespace tactic::eval
