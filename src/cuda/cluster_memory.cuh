// What a block of `cluster` works in: scratch in device memory, and shared memory.
#pragma once

#include <cstdint>

#include "cuda/device.cuh"

namespace tactic::cuda {

constexpr int kClusterThreads = 256;
constexpr int kRowTile = 64, kClusterTile = 128;
/// Dimensions in shared memory at a time where a device has 99 KB: all, or parts in turn, which is slower.
constexpr int small_dims(int dim) { return dim <= 96 ? dim : 64; }

/// Per segment and head, in device memory.
struct Scratch {
  float* centroids;  // [clusters, kDim] relative to the mean key
  float* k_norms2;   // [rows] of the keys, later of the kept ones relative to the mean
  float* v_norms2;   // [rows], later the squared distance to the nearest centroid less the row's norm
  int32_t* rows;     // [rows] kept, relative to the segment
  int32_t* nearest;  // [rows] by kept row
  int32_t* order;    // [rows] kept rows cluster by cluster
  int32_t* starts;   // [clusters + 1]

  __host__ __device__ Scratch(float* memory, int32_t num_rows, int32_t num_clusters, int32_t dim) {
    centroids = memory;
    k_norms2 = centroids + static_cast<int64_t>(num_clusters) * dim;
    v_norms2 = k_norms2 + num_rows;
    rows = reinterpret_cast<int32_t*>(v_norms2 + num_rows);
    nearest = rows + num_rows;
    order = nearest + num_rows;
    starts = order + num_rows;
  }
};

template <int kDim, int kDims>
struct ClusterShared {
  float x[kDims][kRowTile + 4];
  float c[kDims][kClusterTile + 4];
  float c_norms2[kClusterTile];
  float mean[kDim];
  float reduce[kClusterThreads];
  int32_t reduce_index[kClusterThreads];
  int32_t num_kept, num_outliers, num_not_finite;
};

}  // namespace tactic::cuda
