#!/usr/bin/env bash
# Sets up, builds and runs every test. Arguments go to ctest, e.g. scripts/test.sh -R KvIndex.
# scripts/test.sh --gpu runs the tests that need a CUDA device instead, also under compute-sanitizer where it is installed.
# With TACTIC_LLAMA_DIR naming a llama.cpp that was built with CUDA, the plug-in's scenarios run on the device too.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/build.sh"
get_python
NVCC=$(command -v nvcc || ls /usr/local/cuda/bin/nvcc 2>/dev/null || true)
[ -z "$NVCC" ] || say "nvcc is here: the CUDA library is built too (10 minutes more on two cores, once)"
build -DTACTIC_BUILD_TESTS=ON -DTACTIC_BUILD_BENCH=ON -DTACTIC_PYTHON="$PYTHON" -DTACTIC_BUILD_CUDA="$([ -n "$NVCC" ] && echo ON || echo OFF)"
[ -n "$NVCC" ] || say "nvcc was not found: the CUDA library is neither built nor tested"
export TACTIC_TEST_MODEL=$MODEL
if [ "${1:-}" = --gpu ]; then
  [ -n "$NVCC" ] || die "--gpu needs nvcc"
  say "Running the tests on the GPU"
  ctest --test-dir "$BUILD_DIR" --output-on-failure -L gpu "${@:2}"
  if [ -e "$LLAMA_DIR/build/bin/libggml-cuda.so" ]; then
    ctest --test-dir "$BUILD_DIR" --output-on-failure -R '_scenarios_test\.'
  else
    say "$LLAMA_DIR has no CUDA: the plug-in is not tested on the GPU"
  fi
  SANITIZER=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null || true)
  [ -n "$SANITIZER" ] || { say "compute-sanitizer was not found"; exit 0; }
  for tool in memcheck racecheck; do
    "$SANITIZER" --tool "$tool" --error-exitcode 1 "$BUILD_DIR/bin/cuda_device_test" --gtest_filter='Sanitized.*'
  done
  exit
fi
say "Running the tests"
exec ctest --test-dir "$BUILD_DIR" --output-on-failure -j "$(nproc)" -LE gpu "$@"
