// Launch configuration, geometry, ownership and checks of arguments: everything of CUDA that needs no device.
#include <set>

#include "core/random.h"
#include "cuda/launch_config.h"
#include "cuda/segments.h"
#include "support.h"
#include "tactic/error.h"

namespace tactic::test {
namespace {

using cuda::DecodeBatch;
using cuda::DecodeConfig;
using cuda::DecodeLimits;
using cuda::DeviceFacts;
using cuda::IndexGeometry;
using cuda::OwnSegment;
using cuda::OwnSegments;

constexpr DeviceFacts kHopper{132, 232448, true}, kAmpere{108, 166912, false};

IndexGeometry geometry(int32_t max_rows, const IndexOptions& options = {}) {
  return cuda::index_geometry(options, {8, 128, 128}, max_rows);
}

TEST(Geometry, HoldsEveryRowAndCluster) {
  for (const int32_t rows : {1, 255, 2048, 2049, 131072}) {
    const IndexGeometry g = geometry(rows);
    EXPECT_GE(g.max_rows, rows);
    EXPECT_EQ(g.full_clusters, 128);
    EXPECT_EQ(g.provisional_clusters, 64);
    EXPECT_EQ(g.max_clusters, g.max_segments * 128 + 8 * 64);
    EXPECT_EQ(g.code_bytes, 128);
  }
  EXPECT_EQ(cuda::index_geometry({}, {8, 80, 80}, 1).code_bytes, 128);
  EXPECT_EQ(cuda::index_geometry({}, {8, 64, 64}, 1).code_bytes, 64);
}

TEST(Geometry, NamesWhatIsOutOfRange) {
  const auto message = [](auto fn) {
    try {
      fn();
    } catch (const Error& e) {
      return std::string(e.what());
    }
    return std::string("no error");
  };
  EXPECT_EQ(message([] { cuda::index_geometry({}, {8, 72, 72}, 1); }), "head_dim (72) must be 64, 80, 96, 128 or 256");
  EXPECT_EQ(message([] { cuda::index_geometry({}, {8, 64, 128}, 1); }), "v_head_dim (128) must be head_dim (64)");
  EXPECT_EQ(message([] { cuda::index_geometry({}, {8, 64, 64}, 0); }), "max_rows (0) must be in 1..1073741824");
  EXPECT_EQ(message([] {
              cuda::index_geometry({.clustering = Clustering::kWhole}, {8, 64, 64}, 1);
            }),
            "clustering=whole is not available on CUDA");
}

TEST(OwnSegments, EverySegmentHasOneOwnerAndItsClustersOnePlace) {
  const IndexGeometry g = geometry(40960);
  for (const int32_t splits : {1, 2, 4, 8}) {
    for (const cuda::SequenceState state : {cuda::SequenceState{0, 0}, {0, 3}, {1, 0}, {5, 7}, {16, 1}, {20, 0}}) {
      std::set<int32_t> rows, clusters;
      int64_t covered = 0;
      for (int32_t rank = 0; rank < splits; ++rank) {
        const OwnSegments own(g, state, rank, splits);
        int32_t local = 0;
        for (int32_t k = 0; k < own.count(); ++k) {
          const OwnSegment segment = own.at(k);
          EXPECT_EQ(segment.local_cluster, local);
          for (int32_t c = 0; c < segment.num_clusters; ++c) EXPECT_EQ(own.segment_of(local + c), k);
          local += segment.num_clusters;
          EXPECT_TRUE(rows.insert(segment.first_row).second);
          EXPECT_TRUE(clusters.insert(segment.cluster).second);
          EXPECT_LT(segment.slot, g.all_segments);
          EXPECT_LE(segment.cluster + segment.num_clusters, g.max_clusters);
          covered += segment.num_rows;
        }
        EXPECT_EQ(local, own.clusters());
        const DecodeConfig config = cuda::decode_config(kHopper, g, 132 / 8 / splits, 8, 128, 4);
        if (config.splits == splits) {
          EXPECT_LE(own.clusters(), config.own_clusters);
          EXPECT_LE(own.count(), config.own_segments);
        }
      }
      EXPECT_EQ(covered, int64_t{state.full_segments} * 2048 + state.provisional_segments * 256);
      EXPECT_EQ(static_cast<int32_t>(rows.size()), state.full_segments + state.provisional_segments);
    }
  }
}

TEST(DecodeConfig, FillsTheDeviceOnce) {
  const IndexGeometry g = geometry(131072);
  EXPECT_EQ(cuda::decode_config(kHopper, g, 1, 8, 128, 4).splits, 8);
  EXPECT_EQ(cuda::decode_config(kHopper, g, 4, 8, 128, 4).splits, 4);
  EXPECT_EQ(cuda::decode_config(kHopper, g, 8, 8, 128, 4).splits, 2);
  EXPECT_EQ(cuda::decode_config(kHopper, g, 256, 8, 128, 4).splits, 1);
  EXPECT_EQ(cuda::decode_config(kAmpere, g, 1, 8, 128, 4).splits, 1);
}

TEST(DecodeConfig, TablesGoToTheWorkspaceWhereSharedMemoryIsTooSmall) {
  for (const DeviceFacts& device : {kHopper, kAmpere}) {
    for (const int32_t rows : {2048, 131072, 1 << 20, 1 << 24}) {
      for (const int32_t batch : {1, 8, 64}) {
        for (const int32_t dim : {64, 256}) {
          for (const int32_t group : {4, 8}) {
            const DecodeConfig config = cuda::decode_config(device, geometry(rows), batch, 8, dim, group);
            EXPECT_LE(config.shared_bytes, device.shared_bytes_per_block)
                << rows << " " << batch << " d" << dim << " g" << group;
            const size_t tables = cuda::table_bytes(config.own_clusters, config.own_segments, cuda::head_bucket(group));
            EXPECT_TRUE(config.block_workspace_bytes == 0 || config.block_workspace_bytes == tables);
          }
        }
      }
    }
  }
  EXPECT_EQ(cuda::decode_config(kHopper, geometry(131072), 8, 8, 128, 4).block_workspace_bytes, 0u);
  EXPECT_GT(cuda::decode_config(kHopper, geometry(1 << 24), 1, 8, 128, 4).block_workspace_bytes, 0u);
}

TEST(Batch, NamesWhatDoesNotFit) {
  const DecodeLimits limits{4, 32, 8, 128, 4096, {}};
  alignas(16) static std::byte memory[64];
  DecodeBatch good;
  good.num_sequences = 4;
  good.num_q_heads = 32;
  good.num_kv_heads = 8;
  good.head_dim = 128;
  good.k = good.v = {memory, DType::kF16, 1024, 256, 2048, 0, 0};
  good.kv_lens = reinterpret_cast<int32_t*>(memory);
  good.q = good.out = memory;
  cuda::validate(good, limits);
  const auto message = [&](auto change) {
    DecodeBatch bad = good;
    change(bad);
    try {
      cuda::validate(bad, limits);
    } catch (const Error& e) {
      return std::string(e.what());
    }
    return std::string("no error");
  };
  EXPECT_EQ(message([](DecodeBatch& b) { b.num_sequences = 5; }), "num_sequences (5) must be in 1..4");
  EXPECT_EQ(message([](DecodeBatch& b) { b.num_q_heads = 16; }), "num_q_heads (16) must be the limits' 32");
  EXPECT_EQ(message([](DecodeBatch& b) { b.k.token_stride_bytes = 2050; }),
            "k token_stride_bytes (2050) must be a multiple of 16");
  EXPECT_EQ(message([](DecodeBatch& b) { b.v.dtype = DType::kBF16; }), "v's type (bf16) must be k's f16");
  EXPECT_EQ(message([](DecodeBatch& b) { b.k.dtype = b.v.dtype = DType::kF32; }),
            "k's type (f32) must be f16, bf16, q8_0 or q4_0");
  EXPECT_EQ(message([](DecodeBatch& b) { b.q_dtype = DType::kQ8_0; }), "q's type (q8_0) must be f32, f16 or bf16");
  EXPECT_EQ(message([](DecodeBatch& b) { b.page_tables = b.kv_lens; }), "k page_tokens (0) must be at least 1");
  EXPECT_EQ(message([](DecodeBatch& b) { b.v.data = nullptr; }), "v must not be null");
  EXPECT_THROW(cuda::validate(DecodeLimits{1, 30, 8, 128, 1, {}}), Error);
  EXPECT_THROW(cuda::validate(DecodeLimits{1, 72, 8, 128, 1, {}}), Error);
}

}  // namespace
}  // namespace tactic::test
