/* The library from C and from other languages. Every function that can fail returns -1 or NULL then and leaves a
 * message that tactic_last_error() gives to the same thread. Options and queries begin with their size, so that later
 * versions can grow them: fields that a caller's structure does not have yet are as if it had set them to 0. The other
 * structures (tactic_rows, tactic_kv, tactic_step_stats, tactic_mass) stay as they are. */
#ifndef TACTIC_C_API_H
#define TACTIC_C_API_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef enum { TACTIC_F32, TACTIC_F16, TACTIC_BF16, TACTIC_Q8_0, TACTIC_Q4_0 } tactic_dtype;
typedef enum { TACTIC_DENSE, TACTIC_SAMPLE, TACTIC_FIT, TACTIC_TOPK } tactic_select;

/* Rows [num_kv_heads, kv_len, dim]; page_table may be NULL. As tactic::RowsView. */
typedef struct {
  const void* data;
  tactic_dtype dtype;
  int64_t token_stride_bytes, head_stride_bytes;
  const int32_t* page_table;
  int32_t page_tokens;
  int64_t page_stride_bytes;
  int32_t num_pages; /* 0: the table is not checked */
} tactic_rows;

typedef struct {
  tactic_rows k, v;
  int32_t num_kv_heads, head_dim, v_head_dim;
  int64_t kv_len;
} tactic_kv;

/* As tactic::IndexOptions and tactic::DecodeOptions; the *_init functions fill in the defaults. cluster_tokens 0: the
   size follows from the shape. */
typedef struct {
  size_t struct_size;
  int32_t whole_clustering; /* 1; 0: incremental */
  int32_t cluster_tokens, segment_tokens, provisional_tokens, provisional_cluster_tokens, iterations, sink_tokens;
  float outlier_fraction;
  uint64_t seed;
} tactic_index_options;

typedef struct {
  size_t struct_size;
  tactic_select select;
  float target_error, tau, refine, target_mass;
  int32_t budget;
  float beta;
  int32_t check_rows;
  uint64_t seed;
} tactic_decode_options;

typedef struct {
  int64_t kv_len, tokens_certain, tokens_sampled, refined_clusters, index_bytes, kv_bytes, kv_bytes_present;
  double estimated_mass, mass_std_error; /* measured by TACTIC_SAMPLE, 1 and 0 for the others */
  int32_t dense; /* 0: no; answered exactly since 1: that was asked, 2: too little is clustered, 3: bias, 4: a row had
                    changed, 5: a score was not finite */
} tactic_step_stats;

/* As tactic::MassEstimate: measured by TACTIC_SAMPLE, 1 for the others. */
typedef struct {
  double mass, std_error, low, high;
} tactic_mass;

typedef struct tactic_index tactic_index;
typedef struct tactic_attention tactic_attention;
typedef struct tactic_places tactic_places;

/* As tactic::DecodeQuery. Those of one call have one size. */
typedef struct {
  size_t struct_size;
  const float* q; /* [num_q_heads, head_dim] */
  int64_t q_head_stride;
  int32_t num_q_heads;
  float sm_scale;
  tactic_kv kv;
  tactic_index* index;     /* or NULL: dense */
  const uint64_t* visible; /* or NULL */
  const float* bias;       /* or NULL */
  uint64_t stream_id;
  int32_t layer;
  int64_t position; /* one more at each step */
  float* out;       /* [num_q_heads, v_head_dim]; may be the memory of this query's q */
  int64_t out_head_stride;
  float* lse; /* [num_q_heads] or NULL */
  /* May be missing: */
  const int32_t* likely_rows; /* [num_likely_rows] ascending, or NULL */
  int32_t num_likely_rows;
  float tau_factor;    /* 0: 1 */
  tactic_mass* masses; /* [num_q_heads] or NULL */
} tactic_query;

const char* tactic_version(void);
/* What the last call that failed on this thread left, "" before any: valid until the next one fails, or the thread
 * ends. Calls that succeed leave it. */
const char* tactic_last_error(void);

void tactic_index_options_init(tactic_index_options* options);
void tactic_decode_options_init(tactic_decode_options* options);

/* NULL on error. */
tactic_index* tactic_index_create(const tactic_index_options* options, int32_t num_kv_heads, int32_t head_dim,
                                  int32_t v_head_dim);
void tactic_index_free(tactic_index* index);
int tactic_index_write(tactic_index* index, int64_t row_begin, int64_t count);
int tactic_index_truncate(tactic_index* index, int64_t kv_len);
/* Rows that hold nothing any more. */
int tactic_index_remove(tactic_index* index, int64_t row_begin, int64_t count);
/* Another text begins: what steps have learned is of the one before. */
int tactic_index_forget_learned(tactic_index* index);
/* Forgets everything but the options and the number of threads. */
int tactic_index_clear(tactic_index* index);
/* Threads that maintain may use, at most 1024; 0, as in a new index: OpenMP's default. */
int tactic_index_set_num_threads(tactic_index* index, int32_t num_threads);
/* Rows that hold something, and those of them that are in clusters and unchanged since; 0 for NULL. */
int64_t tactic_index_rows_written(const tactic_index* index);
int64_t tactic_index_rows_indexed(const tactic_index* index);
/* max_segments: in full segments, a call with less than 1 builds provisional ones alone; < 0, and with whole_clustering
 * any: all that is due. Returns 1 when another call with this budget would find something to do. */
int tactic_index_maintain(tactic_index* index, const tactic_kv* kv, double max_segments);
/* Number of rows that had changed, or -1. Segments with many of them are dropped whole. */
int64_t tactic_index_verify(tactic_index* index, const tactic_kv* kv);
size_t tactic_index_memory_bytes(const tactic_index* index);

/* num_threads at most 1024; 0: OpenMP's default. NULL on error. */
tactic_attention* tactic_attention_create(const tactic_decode_options* options, int32_t num_threads);
void tactic_attention_free(tactic_attention* attention);
/* stats: [num_queries] or NULL. Writes what it learns into the queries' indexes: one thread at a time for an index. */
int tactic_attention_run(tactic_attention* attention, const tactic_query* queries, size_t num_queries,
                         tactic_step_stats* stats);

/* Where the text stood before as it stands now: rows for a query's likely_rows. As tactic::EarlierPlaces, one per
 * sequence. NULL on error. */
tactic_places* tactic_places_create(void);
void tactic_places_free(tactic_places* places);
/* These rows were overwritten. */
int tactic_places_forget(tactic_places* places, int64_t row_begin, int64_t count);
/* first_layer: its k may be missing. visible: [(kv_len + 63) / 64], or NULL for all; written: [num_written] rows of the
 * last write where they need not be the last, or NULL; those that are not visible are passed over. rows: room for
 * 4 * most, ascending. Returns how many, or -1. */
int32_t tactic_places_find(tactic_places* places, const tactic_kv* first_layer, const uint64_t* visible,
                           const int32_t* written, size_t num_written, int32_t most, int32_t* rows);

#ifdef __cplusplus
}
#endif

#endif
