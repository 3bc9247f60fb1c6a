/* The C interface: a step over 4096 rows through an index, sparse against dense, and an error with its message. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tactic/c_api.h"

enum { kRows = 4096, kDim = 64 };

static float k[kRows * kDim], v[kRows * kDim], q[kDim], sparse[kDim], exact[kDim];

static void fill(float* values, int count) { /* about normal: the sum of twelve uniform numbers */
  for (int i = 0; i < count; ++i) {
    float sum = -6;
    for (int j = 0; j < 12; ++j) sum += (float)rand() / (float)RAND_MAX;
    values[i] = sum;
  }
}

static int run(tactic_select select, const tactic_query* query, tactic_step_stats* stats) {
  tactic_decode_options options;
  tactic_decode_options_init(&options);
  options.select = select;
  tactic_attention* attention = tactic_attention_create(&options, 1);
  const int result = attention == NULL ? -1 : tactic_attention_run(attention, query, 1, stats);
  tactic_attention_free(attention);
  return result;
}

int main(void) {
  fill(k, kRows * kDim);
  fill(v, kRows * kDim);
  fill(q, kDim);
  tactic_query query;
  memset(&query, 0, sizeof query);
  query.struct_size = sizeof query;
  query.q = q;
  query.q_head_stride = query.out_head_stride = kDim;
  query.num_q_heads = 1;
  query.sm_scale = 0.125f;
  query.kv.num_kv_heads = 1;
  query.kv.head_dim = query.kv.v_head_dim = kDim;
  query.kv.kv_len = kRows;
  query.kv.k.data = k;
  query.kv.v.data = v;
  query.kv.k.dtype = query.kv.v.dtype = TACTIC_F32;
  query.kv.k.token_stride_bytes = query.kv.v.token_stride_bytes = kDim * sizeof(float);

  tactic_index_options options;
  tactic_index_options_init(&options);
  tactic_index* index = tactic_index_create(&options, 1, kDim, kDim);
  if (index == NULL || tactic_index_write(index, 0, kRows) != 0 || tactic_index_maintain(index, &query.kv, -1) != 0) {
    fprintf(stderr, "%s\n", tactic_last_error());
    return 1;
  }

  tactic_step_stats stats;
  query.index = index;
  query.out = sparse;
  if (run(TACTIC_SAMPLE, &query, &stats) != 0 || stats.dense != 0) return 2;
  query.out = exact;
  if (run(TACTIC_DENSE, &query, NULL) != 0) return 3;
  double error = 0; /* values have variance 1, so this is in units of a value */
  for (int i = 0; i < kDim; ++i) error += (sparse[i] - exact[i]) * (sparse[i] - exact[i]) / kDim;
  const long long rows = (long long)(stats.tokens_certain + stats.tokens_sampled);
  printf("tactic %s from C: %lld of %d rows, error %.4f\n", tactic_version(), rows, kRows, sqrt(error));
  if (rows >= kRows || sqrt(error) > 0.05) return 4;

  query.num_q_heads = 3;
  query.kv.num_kv_heads = 2;
  if (run(TACTIC_DENSE, &query, NULL) == 0 || strstr(tactic_last_error(), "num_q_heads (3)") == NULL) return 5;
  tactic_index_free(index);
  return 0;
}
