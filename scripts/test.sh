#!/usr/bin/env bash
# Sets up, builds and runs every test. Arguments go to ctest, e.g. scripts/test.sh -R kv_index.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/build.sh"
get_python
build -DTACTIC_BUILD_TESTS=ON -DTACTIC_BUILD_BENCH=ON -DTACTIC_PYTHON="$PYTHON"
export TACTIC_TEST_MODEL=$MODEL
say "Running the tests"
exec ctest --test-dir "$BUILD_DIR" --output-on-failure -j "$(nproc)" "$@"
