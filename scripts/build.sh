#!/usr/bin/env bash
# Sets up and builds everything into build/. Sourced by demo.sh and test.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

build() {
  setup
  local jobs; jobs=$(nproc)
  export CCACHE_DIR=$TACTIC_CACHE/ccache CCACHE_MAXSIZE=1G
  say "Building Tactic"
  cmake -S "$TACTIC_ROOT" -B "$BUILD_DIR" -G Ninja -DCMAKE_BUILD_TYPE=Release -DTACTIC_LLAMA_DIR="$LLAMA_DIR" \
        -DTACTIC_BUILD_PLUGIN=ON -DTACTIC_BUILD_TOOLS=ON \
        -DCMAKE_CXX_COMPILER_LAUNCHER=ccache -DCMAKE_CUDA_COMPILER_LAUNCHER=ccache "$@" > "$TACTIC_CACHE/configure.log" 2>&1 \
    || { tail -30 "$TACTIC_CACHE/configure.log" >&2; die "the project did not configure"; }
  cmake --build "$BUILD_DIR" -j "$jobs" > "$TACTIC_CACHE/build.log" 2>&1 \
    || { grep -E -A8 'error|FAILED' "$TACTIC_CACHE/build.log" | head -60 >&2; die "the project did not build"; }
  exec 9>&-  # setup's lock
}

if [ "${BASH_SOURCE[0]}" = "$0" ]; then build "$@"; fi
