#include "tactic/c_api.h"

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <exception>
#include <string>
#include <vector>

#include "tactic/attention.h"
#include "tactic/earlier_places.h"
#include "tactic/error.h"

struct tactic_index {
  tactic::KvIndex index;
};

struct tactic_attention {
  tactic::Attention attention;
  std::vector<tactic::DecodeQuery> queries;
  std::vector<tactic::StepStats> stats;
  std::vector<tactic::MassEstimate> masses;  // of all queries
};

struct tactic_places {
  tactic::EarlierPlaces places;
  std::vector<int32_t> rows;
};

namespace {

constexpr size_t kMaxQueries = size_t{1} << 24;

thread_local std::string last_error;

void remember(const char* what) noexcept {
  try {
    last_error = what;
  } catch (...) {
    last_error.assign("out of memory");  // short enough to need none
  }
}

template <class T, class Fn>
T guarded(T failure, Fn fn) {
  try {
    return fn();
  } catch (const std::exception& error) {
    remember(error.what());
  } catch (...) {
    remember("unknown error");
  }
  return failure;
}

template <class T>
const T& checked(const T* pointer, const char* name) {
  if (pointer == nullptr) throw tactic::Error(std::string(name) + " must not be null");
  return *pointer;
}

// The caller's structure, of this version or of an older one, down to `smallest` bytes.
template <class T>
T sized(const T* pointer, const char* name, size_t smallest = sizeof(T)) {
  const size_t size = checked(pointer, name).struct_size;
  if (size < smallest || size > sizeof(T) || size % alignof(T) != 0) {
    const std::string sizes = smallest < sizeof(T) ? std::to_string(smallest) + ".." : "";
    throw tactic::Error(std::string(name) + ".struct_size (" + std::to_string(size) + ") must be " + sizes +
                        std::to_string(sizeof(T)) + ", a multiple of " + std::to_string(alignof(T)));
  }
  T whole{};
  std::memcpy(&whole, pointer, size);
  return whole;
}

// A caller may have put any number into an enumeration; C++ may only look at it as bytes.
template <class E>
uint8_t checked_enum(const E& field, const char* name, int32_t limit) {
  int32_t value;
  static_assert(sizeof value == sizeof field);
  std::memcpy(&value, &field, sizeof value);
  if (value < 0 || value > limit)
    throw tactic::Error(std::string(name) + " (" + std::to_string(value) + ") must be in 0.." + std::to_string(limit));
  return static_cast<uint8_t>(value);
}

tactic::RowsView rows_of(const tactic_rows& rows) {
  return {rows.data,
          static_cast<tactic::DType>(checked_enum(rows.dtype, "dtype", TACTIC_Q4_0)),
          rows.token_stride_bytes,
          rows.head_stride_bytes,
          rows.page_table,
          rows.page_tokens,
          rows.page_stride_bytes,
          rows.num_pages};
}

tactic::KvView view_of(const tactic_kv& kv) {
  return {rows_of(kv.k), rows_of(kv.v), kv.num_kv_heads, kv.head_dim, kv.v_head_dim, kv.kv_len};
}

tactic::DecodeQuery query_of(const tactic_query& q) {
  tactic::DecodeQuery query;
  query.q = q.q;
  query.q_head_stride = q.q_head_stride;
  query.num_q_heads = q.num_q_heads;
  query.sm_scale = q.sm_scale;
  query.kv = view_of(q.kv);
  query.index = q.index != nullptr ? &q.index->index : nullptr;
  query.visible = q.visible;
  query.bias = q.bias;
  query.stream_id = q.stream_id;
  query.layer = q.layer;
  query.position = q.position;
  query.out = q.out;
  query.out_head_stride = q.out_head_stride;
  query.lse = q.lse;
  query.likely_rows = q.likely_rows;
  query.num_likely_rows = q.num_likely_rows;
  query.tau_factor = q.tau_factor != 0 ? q.tau_factor : 1;
  return query;
}

constexpr size_t kFirstQuery = offsetof(tactic_query, likely_rows);

// Query number i; those before it have the size of the first.
tactic_query query_at(const tactic_query* queries, size_t i) {
  const auto* at = reinterpret_cast<const std::byte*>(queries) + i * queries->struct_size;
  const tactic_query query = sized(reinterpret_cast<const tactic_query*>(at), "query", kFirstQuery);
  if (query.struct_size != queries->struct_size) {
    throw tactic::Error("query.struct_size (" + std::to_string(query.struct_size) + ") must be that of the first (" +
                        std::to_string(queries->struct_size) + ")");
  }
  return query;
}

}  // namespace

const char* tactic_version(void) { return TACTIC_VERSION; }
const char* tactic_last_error(void) { return last_error.c_str(); }

void tactic_index_options_init(tactic_index_options* o) {
  if (o == nullptr) return;
  const tactic::IndexOptions d;
  *o = {sizeof *o,
        0,
        d.cluster_tokens,
        d.segment_tokens,
        d.provisional_tokens,
        d.provisional_cluster_tokens,
        d.iterations,
        d.sink_tokens,
        d.outlier_fraction,
        d.seed};
}

void tactic_decode_options_init(tactic_decode_options* o) {
  if (o == nullptr) return;
  const tactic::DecodeOptions d;
  *o = {sizeof *o,      static_cast<tactic_select>(d.select),
        d.target_error, d.tau,
        d.refine,       d.target_mass,
        d.budget,       d.beta,
        d.check_rows,   d.seed};
}

tactic_index* tactic_index_create(const tactic_index_options* options, int32_t num_kv_heads, int32_t head_dim,
                                  int32_t v_head_dim) {
  return guarded<tactic_index*>(nullptr, [&] {
    const tactic_index_options o = sized(options, "options");
    tactic::IndexOptions d;
    if (o.whole_clustering != 0 && o.whole_clustering != 1)
      throw tactic::Error("whole_clustering (" + std::to_string(o.whole_clustering) + ") must be 0 or 1");
    d.clustering = o.whole_clustering != 0 ? tactic::Clustering::kWhole : tactic::Clustering::kIncremental;
    d.cluster_tokens = o.cluster_tokens;
    d.segment_tokens = o.segment_tokens;
    d.provisional_tokens = o.provisional_tokens;
    d.provisional_cluster_tokens = o.provisional_cluster_tokens;
    d.iterations = o.iterations;
    d.sink_tokens = o.sink_tokens;
    d.outlier_fraction = o.outlier_fraction;
    d.seed = o.seed;
    return new tactic_index{tactic::KvIndex(d, {num_kv_heads, head_dim, v_head_dim})};
  });
}

void tactic_index_free(tactic_index* index) { delete index; }

int tactic_index_write(tactic_index* index, int64_t row_begin, int64_t count) {
  return guarded(-1, [&] {
    checked(index, "index");
    index->index.write(row_begin, count);
    return 0;
  });
}

int tactic_index_truncate(tactic_index* index, int64_t kv_len) {
  return guarded(-1, [&] {
    checked(index, "index");
    index->index.truncate(kv_len);
    return 0;
  });
}

int tactic_index_remove(tactic_index* index, int64_t row_begin, int64_t count) {
  return guarded(-1, [&] {
    checked(index, "index");
    index->index.remove(row_begin, count);
    return 0;
  });
}

int tactic_index_forget_learned(tactic_index* index) {
  return guarded(-1, [&] {
    checked(index, "index");
    index->index.forget_learned();
    return 0;
  });
}

int tactic_index_clear(tactic_index* index) {
  return guarded(-1, [&] {
    checked(index, "index");
    index->index.clear();
    return 0;
  });
}

int tactic_index_set_num_threads(tactic_index* index, int32_t num_threads) {
  return guarded(-1, [&] {
    checked(index, "index");
    index->index.set_num_threads(num_threads);
    return 0;
  });
}

int64_t tactic_index_rows_written(const tactic_index* index) {
  return index != nullptr ? index->index.rows_written() : 0;
}

int64_t tactic_index_rows_indexed(const tactic_index* index) {
  return index != nullptr ? index->index.rows_indexed() : 0;
}

int tactic_index_maintain(tactic_index* index, const tactic_kv* kv, double max_segments) {
  return guarded(-1, [&] {
    checked(index, "index");
    return index->index.maintain(view_of(checked(kv, "kv")), max_segments) ? 1 : 0;
  });
}

int64_t tactic_index_verify(tactic_index* index, const tactic_kv* kv) {
  return guarded<int64_t>(-1, [&] {
    checked(index, "index");
    return index->index.verify(view_of(checked(kv, "kv")));
  });
}

size_t tactic_index_memory_bytes(const tactic_index* index) {
  return index != nullptr ? index->index.memory_bytes() : 0;
}

tactic_attention* tactic_attention_create(const tactic_decode_options* options, int32_t num_threads) {
  return guarded<tactic_attention*>(nullptr, [&] {
    const tactic_decode_options o = sized(options, "options");
    tactic::DecodeOptions d;
    d.select = static_cast<tactic::Select>(checked_enum(o.select, "select", TACTIC_TOPK));
    d.target_error = o.target_error;
    d.tau = o.tau;
    d.refine = o.refine;
    d.target_mass = o.target_mass;
    d.budget = o.budget;
    d.beta = o.beta;
    d.check_rows = o.check_rows != 0;
    d.seed = o.seed;
    return new tactic_attention{tactic::Attention(d, tactic::Backend::kCpu, num_threads), {}, {}, {}};
  });
}

void tactic_attention_free(tactic_attention* attention) { delete attention; }

int tactic_attention_run(tactic_attention* attention, const tactic_query* queries, size_t num_queries,
                         tactic_step_stats* stats) {
  return guarded(-1, [&] {
    checked(attention, "attention");
    if (num_queries > kMaxQueries)
      throw tactic::Error("num_queries (" + std::to_string(num_queries) + ") must be in 0.." +
                          std::to_string(kMaxQueries));
    if (num_queries > 0) checked(queries, "queries");
    attention->queries.clear();
    size_t heads = 0;
    for (size_t i = 0; i < num_queries; ++i) {
      const tactic_query query = query_at(queries, i);
      attention->queries.push_back(query_of(query));
      tactic::validate(attention->queries.back());
      if (query.masses != nullptr) heads += static_cast<size_t>(query.num_q_heads);
    }
    attention->masses.resize(heads);
    tactic::MassEstimate* masses = attention->masses.data();
    for (size_t i = 0; i < num_queries; ++i) {
      if (query_at(queries, i).masses == nullptr) continue;
      attention->queries[i].masses = masses;
      masses += attention->queries[i].num_q_heads;
    }
    attention->stats.resize(num_queries);
    attention->attention.run(attention->queries, attention->stats.data());
    for (size_t i = 0; stats != nullptr && i < num_queries; ++i) {
      const tactic::StepStats& s = attention->stats[i];
      stats[i] = {s.kv_len,   s.tokens_certain,   s.tokens_sampled, s.refined_clusters, s.index_bytes,
                  s.kv_bytes, s.kv_bytes_present, s.estimated_mass, s.mass_std_error,   static_cast<int32_t>(s.dense)};
    }
    for (size_t i = 0; i < num_queries; ++i) {
      const tactic::MassEstimate* from = attention->queries[i].masses;
      if (from == nullptr) continue;
      const tactic_query query = query_at(queries, i);
      for (int32_t h = 0; h < query.num_q_heads; ++h)
        query.masses[h] = {from[h].mass, from[h].std_error, from[h].low, from[h].high};
    }
    return 0;
  });
}

tactic_places* tactic_places_create(void) {
  return guarded<tactic_places*>(nullptr, [] { return new tactic_places; });
}

void tactic_places_free(tactic_places* places) { delete places; }

int tactic_places_forget(tactic_places* places, int64_t row_begin, int64_t count) {
  return guarded(-1, [&] {
    checked(places, "places");
    places->places.forget(row_begin, count);
    return 0;
  });
}

int32_t tactic_places_find(tactic_places* places, const tactic_kv* first_layer, const uint64_t* visible,
                           const int32_t* written, size_t num_written, int32_t most, int32_t* rows) {
  return guarded(-1, [&] {
    checked(places, "places");
    const tactic::KvView kv = view_of(checked(first_layer, "first_layer"));
    if (num_written > 0) checked(written, "written");
    if (most > 0) checked(rows, "rows");
    const size_t words = visible != nullptr && kv.kv_len > 0 ? (static_cast<size_t>(kv.kv_len) + 63) / 64 : 0;
    places->places.find(kv, {visible, words}, {written, num_written}, most, places->rows);
    std::copy(places->rows.begin(), places->rows.end(), rows);
    return static_cast<int>(places->rows.size());
  });
}
