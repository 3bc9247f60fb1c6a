#!/usr/bin/env bash
# ggml's own operator tests, against its CPU backend: host_conformance.sh PLUGIN LLAMA_BIN_DIR
# What the plug-in declines is "not supported"; so the cases really computed are counted, by the type of the cache.
set -euo pipefail
plugin=$1 bin=$2
export GGML_BACKEND_PATH=$plugin TACTIC=select=dense,accept=any,min_context=0
unset TACTIC_STATS
out=$(mktemp); trap 'rm -f "$out"' EXIT
failures=0

fail() { printf 'host_conformance: %s\n' "$*" >&2; failures=$((failures + 1)); }

run() {  # OPERATOR [more arguments]
  local operator=$1; shift
  "$bin/test-backend-ops" test -b TACTIC -o "$operator" "$@" 2>&1 | sed 's/\x1b\[[0-9;]*m//g' > "$out" ||
    { grep -E -m 20 'FAIL|error' "$out" >&2; fail "$operator failed"; }
  grep -q 'Backend TACTIC: OK' "$out" || fail "$operator: the device TACTIC was not tested"
}

count() { grep -E -c -- "$1.*: OK\$" "$out" || true; }

require() {  # WHAT PATTERN
  local n; n=$(count "$2")
  printf '%-44s %4d cases computed\n' "$1" "$n"
  [ "$n" -gt 0 ] || fail "no case computed of $1"
}

run FLASH_ATTN_EXT -p 'nb=(1|2|3|4|8|32|35),'
for type in f32 f16 bf16 q8_0 q4_0; do
  require "FLASH_ATTN_EXT one row, cache $type" "FLASH_ATTN_EXT\(.*nb=1,.*type_K=$type,type_V=$type,"
done
require "FLASH_ATTN_EXT few rows" 'FLASH_ATTN_EXT\(.*nb=[2-8],'
require "FLASH_ATTN_EXT many rows" 'FLASH_ATTN_EXT\(.*nb=3[25],'
require "FLASH_ATTN_EXT several streams" 'FLASH_ATTN_EXT\(.*nr23=\[[0-9]+,[2-9]\],.*nb=[1-8],'
require "FLASH_ATTN_EXT K and V of other types" 'FLASH_ATTN_EXT\(.*type_K=q8_0,type_V=q4_0,'
require "FLASH_ATTN_EXT without a mask" 'FLASH_ATTN_EXT\(.*nb=1,mask=0,'

run SET_ROWS
for type in f32 f16 bf16 q8_0 q4_0; do
  require "SET_ROWS into $type" "SET_ROWS\((type_src=f32,type_dst|type)=$type,"  # older versions write the latter
done

[ "$failures" = 0 ]
