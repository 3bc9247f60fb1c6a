#!/usr/bin/env bash
# include <- core <- {reference, cpu, cuda} <- {plugins, tools, eval, bench}; ggml headers only where ggml is; at most
# 500 lines a file. Prints what breaks the law.
set -euo pipefail
CDPATH='' cd -- "${1:-$(dirname -- "$0")/..}"

files() { find "$@" -type f -regex '.*\.\(h\|cc\|cu\|cuh\|cpp\|py\|sh\)' 2>/dev/null || true; }
sources() { files include src plugins tools eval bench tests scripts; }
broken=0
forbid() { # PATTERN of included headers, FOLDER...
  local pattern=$1; shift
  local found; found=$(files "$@" | xargs -r grep -HnE "^ *# *include *[\"<]($pattern)" || true)
  [ -z "$found" ] || { echo "$found"; broken=1; }
}

users='plugins|tools|eval|bench|tests'
forbid "core/|reference/|cpu/|cuda/|$users" include
forbid "reference/|cpu/|cuda/|$users" src/core
forbid "cpu/|cuda/|$users" src/reference
forbid "reference/|cuda/|$users" src/cpu
forbid "reference/|cpu/|$users" src/cuda
forbid 'ggml|llama|gguf' include src eval bench tests/core tests/cpu tests/equivalence tests/eval tests/properties tests/support.h tests/support.cc
forbid 'torch|ATen|c10/|pybind11' include src plugins tools eval bench
forbid 'nlohmann|CLI/' include src plugins
long=$(sources | xargs -r wc -l | awk '$2 != "total" && $1 > 500 {print $2 ": " $1 " lines, at most 500"}')
[ -z "$long" ] || { echo "$long"; broken=1; }
exit $broken
