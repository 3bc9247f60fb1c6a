/* The C interface: a dense step over two rows, and an error that names what is wrong. */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "tactic/c_api.h"

int main(void) {
  float k[32] = {0}, v[32], q[16] = {1}, out[16];
  for (int i = 0; i < 32; ++i) v[i] = i < 16 ? 1.0f : 3.0f;
  tactic_decode_options options;
  tactic_decode_options_init(&options);
  options.select = TACTIC_DENSE;
  tactic_attention* attention = tactic_attention_create(&options, 1);
  tactic_query query;
  memset(&query, 0, sizeof query);
  query.struct_size = sizeof query;
  query.q = q;
  query.q_head_stride = query.out_head_stride = 16;
  query.num_q_heads = 1;
  query.sm_scale = 1;
  query.kv.num_kv_heads = 1;
  query.kv.head_dim = query.kv.v_head_dim = 16;
  query.kv.kv_len = 2;
  query.kv.k.data = k;
  query.kv.v.data = v;
  query.kv.k.dtype = query.kv.v.dtype = TACTIC_F32;
  query.kv.k.token_stride_bytes = query.kv.v.token_stride_bytes = 64;
  query.out = out;
  tactic_step_stats stats;
  if (attention == NULL || tactic_attention_run(attention, &query, 1, &stats) != 0 || fabsf(out[7] - 2.0f) > 1e-6f)
    return 1;
  query.num_q_heads = 3;
  query.kv.num_kv_heads = 2;
  if (tactic_attention_run(attention, &query, 1, NULL) == 0 || strstr(tactic_last_error(), "num_q_heads (3)") == NULL)
    return 2;
  tactic_attention_free(attention);
  printf("tactic %s from C\n", tactic_version());
  return 0;
}
