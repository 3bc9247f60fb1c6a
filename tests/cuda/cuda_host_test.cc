// Launch configuration, geometry, ownership and checks of arguments: everything of CUDA that needs no device.
#include <set>

#include "core/random.h"
#include "cuda/launch_config.h"
#include "cuda/segments.h"
#include "support.h"

namespace tactic::test {
namespace {

using cuda::DecodeBatch;
using cuda::DecodeConfig;
using cuda::DecodeLimits;
using cuda::DeviceFacts;
using cuda::IndexGeometry;
using cuda::OwnSegment;
using cuda::OwnSegments;

// An H100: clusters lie within one of its parts, which have 16 or 18 multiprocessors.
constexpr DeviceFacts hopper() {
  DeviceFacts facts{132, 232448, true, {}};
  for (int32_t blocks = 1; blocks <= cuda::kMaxSplits; ++blocks) {
    for (const int32_t part : {16, 16, 16, 16, 16, 16, 18, 18}) facts.clusters_of[blocks] += part / blocks;
  }
  return facts;
}
constexpr DeviceFacts kHopper = hopper(), kAmpere{108, 166912, false, {}};

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
  if (cuda::is_compiled(DType::kF16, 80)) {
    EXPECT_EQ(cuda::index_geometry({}, {8, 80, 80}, 1).code_bytes, 128);
  }
  EXPECT_EQ(cuda::index_geometry({}, {8, 64, 64}, 1).code_bytes, 64);
}

TEST(Geometry, NamesWhatIsOutOfRange) {
  EXPECT_EQ(message_of([] {
              cuda::index_geometry({}, {8, 72, 72}, 1);
            }),
            std::string("head_dim (72) must be ") +
                (cuda::is_compiled(DType::kF16, 80) ? "64, 80, 96, 128 or 256" : "64 or 128"));
  EXPECT_EQ(message_of([] { cuda::index_geometry({}, {8, 64, 128}, 1); }), "v_head_dim (128) must be head_dim (64)");
  EXPECT_EQ(message_of([] { cuda::index_geometry({}, {8, 64, 64}, 0); }), "max_rows (0) must be in 1..1073741824");
  EXPECT_EQ(message_of([] {
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

TEST(OwnSegments, AreFoundUpToTheMostClustersThatABlockMayOwn) {
  for (int32_t per = 16; per <= 65536; per += per < 1024 ? 16 : 4080) {
    IndexGeometry g;
    g.full_clusters = g.provisional_clusters = per;
    for (const cuda::SequenceState state :
         {cuda::SequenceState{cuda::kMaxOwnClusters / per, 0}, {0, cuda::kMaxOwnClusters / per}}) {
      const OwnSegments own(g, state, 0, 1);
      int32_t wrong = 0;
      for (int32_t k = 0; k < own.count(); ++k)
        wrong += own.segment_of(k * per) != k || own.segment_of(k * per + per - 1) != k;
      EXPECT_EQ(wrong, 0) << per;
    }
  }
}

TEST(Limits, OfBlocksAndRanks) {
  const IndexOptions fine{.cluster_tokens = 2};
  EXPECT_EQ(message_of([&] { cuda::decode_config(kHopper, geometry(1 << 22, fine), 64, 8, 128, 4); }), "no error");
  EXPECT_EQ(message_of([&] { cuda::decode_config(kHopper, geometry(1 << 23, fine), 64, 8, 128, 4); }),
            "clusters of one block of a step (4194816) must be in 0..4194304");
  const auto rank = [](int32_t sequences) {
    cuda::RankParams params;
    const DecodeLimits limits{sequences, 8, 8, 64, 256, {}};
    return message_of([&] { cuda::lay_out_rank(params, geometry(256), limits, nullptr); });
  };
  EXPECT_EQ(rank(8191), "no error");
  EXPECT_EQ(rank(8192), "max_sequences * num_kv_heads of fit and topk (65536) must be in 1..65535");
}

TEST(Segments, AnIndexThatHoldsHiddenRowsIsOfNoUse) {
  const IndexGeometry g = geometry(40960);
  const cuda::SequenceState state{1, 2};  // 2560 rows
  for (const int32_t kv_len : {2560, 2561, 40960}) EXPECT_EQ(cuda::usable_state(g, state, kv_len), state);
  for (const int32_t kv_len : {0, 2048, 2559})
    EXPECT_EQ(cuda::usable_state(g, state, kv_len), cuda::SequenceState{}) << kv_len;
}

TEST(DecodeConfig, FillsTheDeviceOnce) {
  const IndexGeometry g = geometry(131072);
  EXPECT_EQ(cuda::decode_config(kHopper, g, 1, 8, 128, 4).splits, 8);
  EXPECT_EQ(cuda::decode_config(kHopper, g, 3, 8, 128, 4).splits, 5);
  EXPECT_EQ(cuda::decode_config(kHopper, g, 4, 8, 128, 4).splits, 4);
  EXPECT_EQ(cuda::decode_config(kHopper, g, 5, 8, 128, 4).splits, 3);
  EXPECT_EQ(cuda::decode_config(kHopper, g, 8, 8, 128, 4).splits, 2);
  EXPECT_EQ(cuda::decode_config(kHopper, g, 256, 8, 128, 4).splits, 1);
  EXPECT_EQ(cuda::decode_config(kAmpere, g, 1, 8, 128, 4).splits, 1);
}

TEST(DecodeConfig, TablesGoToTheWorkspaceWhereSharedMemoryIsTooSmall) {
  for (const DeviceFacts& device : {kHopper, kAmpere}) {
    for (const int32_t rows : {2048, 131072, 1 << 20, 1 << 24}) {
      for (const int32_t batch : {1, 8, 64}) {
        for (const int32_t dim : {64, 128, 256}) {
          for (const int32_t group : {4, 8}) {
            const DecodeConfig config = cuda::decode_config(device, geometry(rows), batch, 8, dim, group);
            EXPECT_LE(config.shared_bytes, device.shared_bytes_per_block)
                << rows << " " << batch << " d" << dim << " g" << group;
            const size_t tables = cuda::table_bytes(config.own_clusters, config.own_segments, cuda::head_bucket(group));
            EXPECT_TRUE(config.block_workspace_bytes == 0 || config.block_workspace_bytes == tables);
            const size_t in_shared = config.block_workspace_bytes == 0 ? tables : 0;
            EXPECT_EQ(config.shared_bytes, cuda::fixed_bytes(dim, cuda::head_bucket(group), config.stages) + in_shared);
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
    return message_of([&] { cuda::validate(bad, limits); });
  };
  EXPECT_EQ(message([](DecodeBatch& b) { b.num_sequences = 5; }), "num_sequences (5) must be in 1..4");
  EXPECT_EQ(message([](DecodeBatch& b) { b.num_q_heads = 16; }), "num_q_heads (16) must be the limits' 32");
  EXPECT_EQ(message([](DecodeBatch& b) { b.k.token_stride_bytes = 2050; }),
            "k token_stride_bytes (2050) must be a multiple of 16");
  EXPECT_EQ(message([](DecodeBatch& b) { b.k.token_stride_bytes = 0; }),
            "k token_stride_bytes (0) must be at least a row's 256 bytes");
  EXPECT_EQ(message([](DecodeBatch& b) { b.v.head_stride_bytes = 240; }),
            "v head_stride_bytes (240) must be at least a row's 256 bytes");
  EXPECT_EQ(message([](DecodeBatch& b) { b.k.sequence_stride_bytes = 0; }),
            "k sequence_stride_bytes (0) must be at least a row's 256 bytes");
  EXPECT_EQ(message([](DecodeBatch& b) { b.k.sequence_stride_bytes = 0, b.num_sequences = 1; }), "no error");
  EXPECT_EQ(message([](DecodeBatch& b) { b.v.token_stride_bytes = 256; }),
            "v token_stride_bytes (256) must be at least 2048, or head_stride_bytes (256) at least 512: rows of "
            "different heads overlap");
  const auto paged = [](DecodeBatch& b, int32_t page_tokens) {
    b.page_tables = b.kv_lens;
    b.max_pages = 2;
    b.k.page_tokens = b.v.page_tokens = page_tokens;
  };
  EXPECT_EQ(message([&](DecodeBatch& b) { paged(b, 16); }),
            "k page_stride_bytes (0) must be at least a row's 256 bytes");
  EXPECT_EQ(message([&](DecodeBatch& b) {
              paged(b, 1);
              b.k.token_stride_bytes = b.v.token_stride_bytes = 0;  // says nothing then
              b.k.page_stride_bytes = b.v.page_stride_bytes = 2048;
            }),
            "no error");
  EXPECT_EQ(message([](DecodeBatch& b) { b.v.dtype = DType::kBF16; }), "v's type (bf16) must be k's f16");
  EXPECT_EQ(message([](DecodeBatch& b) { b.k.dtype = b.v.dtype = DType::kF32; }),
            std::string("k's type (f32) must be ") +
                (cuda::is_compiled(DType::kQ8_0, 64) ? "f16, bf16, f8_e4m3, q8_0 or q4_0" : "f16, bf16 or f8_e4m3"));
  EXPECT_EQ(message([](DecodeBatch& b) { b.q_dtype = DType::kQ8_0; }), "q's type (q8_0) must be f32, f16 or bf16");
  EXPECT_EQ(message([](DecodeBatch& b) { b.page_tables = b.kv_lens; }), "k page_tokens (0) must be at least 1");
  EXPECT_EQ(message([](DecodeBatch& b) { b.v.data = nullptr; }), "v must not be null");
  for (const int32_t count : {0, 65}) {
    EXPECT_EQ(message([&](DecodeBatch& b) {
                b.likely_rows = b.kv_lens;
                b.max_likely_rows = count;
              }),
              text("max_likely_rows (", count, ") must be in 1..64"));
  }
  EXPECT_EQ(message([](DecodeBatch& b) { b.max_likely_rows = 3; }), "no error");
  static constexpr float kScale = 1;
  EXPECT_EQ(message([](DecodeBatch& b) { b.k.head_scales = &kScale; }), "k head_scales must be null for f16");
  EXPECT_EQ(message([](DecodeBatch& b) {
              b.k.dtype = b.v.dtype = DType::kF8E4M3;
              b.k.head_scales = &kScale;
              b.k.token_stride_bytes = 2056;
            }),
            "no error");
  EXPECT_THROW(cuda::validate(DecodeLimits{1, 30, 8, 128, 1, {}}), Error);
  EXPECT_THROW(cuda::validate(DecodeLimits{1, 72, 8, 128, 1, {}}), Error);
}

TEST(Tables, LengthsAndPagesOutOfRangeAreRefused) {
  DecodeBatch batch;
  batch.num_sequences = 2;
  batch.max_pages = 3;
  batch.k.page_tokens = batch.v.page_tokens = 16;
  const std::vector<int32_t> lens{33, 0}, pages{4, 0, 2, -7, 99, -7};  // the second sequence uses none of its pages
  batch.page_tables = pages.data();
  const auto message = [&](std::vector<int32_t> kv_lens, std::vector<int32_t> table, int32_t num_pages = 5) {
    return message_of([&] { cuda::validate({kv_lens.data(), table.data(), num_pages}, batch, 1000); });
  };
  EXPECT_EQ(message(lens, pages), "no error");
  EXPECT_EQ(message({33, 1}, pages), "page_tables[3] (-7) must be in 0..4");
  EXPECT_EQ(message(lens, pages, 4), "page_tables[0] (4) must be in 0..3");
  EXPECT_EQ(message({33, -1}, pages), "kv_lens[1] (-1) must be in 0..1000");
  EXPECT_EQ(message({1001, 0}, pages), "kv_lens[0] (1001) must be in 0..1000");
  EXPECT_EQ(message({49, 0}, pages), "pages of kv_lens[0] (4) must be in 0..3");
  EXPECT_EQ(message_of([&] {
              cuda::validate({lens.data(), nullptr, 5}, batch, 1000);
            }),
            "the host must have page_tables when the batch has them, and only then");
  EXPECT_EQ(message_of([&] { cuda::validate({}, batch, 1000); }), "the host's kv_lens must not be null");
}

TEST(Upload, TakesWhatTheDeviceCanHold) {
  CacheSpec spec;
  spec.kv_len = 5000;
  const Cache cache(spec);
  const KvShape shape{2, 64, 64};
  const IndexGeometry g = cuda::index_geometry({}, shape, 5000);
  const auto state = [&](const KvIndex& index) { return cuda::uploaded_state(index, {}, shape, g); };
  const std::unique_ptr<KvIndex> index = build_index(cache);
  EXPECT_EQ(state(*index), cuda::state_at(g, 5000));
  index->write(4500, 1);
  EXPECT_EQ(state(*index), cuda::state_at(g, 4500)) << "up to the part with a row that was rewritten";
  index->truncate(3000);
  EXPECT_EQ(state(*index), cuda::state_at(g, 2048)) << "the second segment has lost rows";
  index->write(1, 2);  // sinks, which are in no segment
  EXPECT_EQ(state(*index), cuda::state_at(g, 2048));
  EXPECT_EQ(state(KvIndex({}, shape)), cuda::SequenceState{});

  const auto message = [&](const KvIndex& other) { return message_of([&] { state(other); }); };
  EXPECT_EQ(message(KvIndex({.cluster_tokens = 32}, shape)), "the index was made with other options");
  EXPECT_EQ(message(KvIndex({}, {3, 64, 64})), "num_kv_heads (3) must be the device index's 2");
  EXPECT_EQ(message(KvIndex({}, {2, 128, 64})), "head_dim (128) must be the device index's 64");
  EXPECT_EQ(message(KvIndex({}, {2, 64, 128})), "v_head_dim (128) must be the device index's 64");
  const std::string rest = " must follow the last and lie below 6144, full ones before at most 8 provisional ones";
  KvIndex parts({}, shape);  // never given the time for a full segment
  parts.write(0, 5000);
  for (int i = 0; i < 40; ++i) parts.maintain(cache.view(), 0.5);
  EXPECT_EQ(message(parts), "segment at row 2048" + rest);
  const std::unique_ptr<KvIndex> hole = build_index(cache);
  hole->remove(1000, 1);
  EXPECT_EQ(message(*hole), "segment at row 2048" + rest);
  CacheSpec longer = spec;
  longer.kv_len = 6400;
  EXPECT_EQ(message(*build_index(Cache(longer))), "segment at row 6144" + rest);
}

TEST(StepStats, AddsUpTheHeadsOfASequence) {
  DecodeBatch batch;
  batch.num_kv_heads = 2;
  batch.head_dim = 64;
  batch.k.dtype = batch.v.dtype = DType::kF16;
  cuda::StepRecord sparse{}, dense{};
  sparse.kv_len = dense.kv_len = 1000;
  sparse.tokens_exact = 30;
  sparse.tokens_selected = 100;
  sparse.tokens_sampled = 60;
  sparse.clusters_refined = 2;
  sparse.tokens_refined = 7;
  sparse.tokens_probed = 11;
  sparse.clusters = 160;
  sparse.segments = 2;
  sparse.certain_mass = 0.5f;
  sparse.mass_std_error = 0.1f;
  dense.tokens_exact = 1000;
  dense.certain_mass = 1;
  dense.dense = DenseReason::kRowChanged;
  const cuda::StepRecord records[] = {sparse, dense};
  const StepStats stats = cuda::step_stats(records, batch, {});
  EXPECT_EQ(stats.kv_len, 1000);
  EXPECT_EQ(stats.tokens_certain, 30 + 100 + 7 - 60 + 1000);
  EXPECT_EQ(stats.tokens_sampled, 60);
  EXPECT_EQ(stats.tokens_value, 1137);
  EXPECT_EQ(stats.refined_clusters, 2);
  EXPECT_EQ(stats.kv_bytes, 1137 * 256 + 11 * 128);
  EXPECT_EQ(stats.kv_bytes_present, 2000 * 256);
  EXPECT_EQ(stats.index_bytes, 160 / 16 * cuda::tile_bytes(64) + 2 * 2 + 107 * 3);
  EXPECT_DOUBLE_EQ(stats.estimated_mass, 0.75);
  EXPECT_NEAR(stats.mass_std_error, std::sqrt(0.1 * 0.1 / 2), 1e-7);
  EXPECT_EQ(stats.dense, DenseReason::kNone);
  batch.num_kv_heads = 1;
  EXPECT_EQ(cuda::step_stats(&dense, batch, {}).dense, DenseReason::kRowChanged);
}

TEST(SharedMemory, NamesWhatADeviceLacks) {
  constexpr DeviceFacts kAda{128, 101376, false, {}};
  const size_t bytes = cuda::fixed_bytes(256, 8, 1);
  EXPECT_EQ(message_of([&] { cuda::check_shared("head_dim 256", bytes, kAda); }),
            text("head_dim 256 needs ", bytes, " bytes of shared memory per block, the device has 101376"));
  cuda::check_shared("head_dim 128", cuda::fixed_bytes(128, 8, 1), kAda);
  cuda::check_shared("head_dim 256", bytes, kAmpere);
}

}  // namespace
}  // namespace tactic::test
