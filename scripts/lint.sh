#!/usr/bin/env bash
# Formatting and lint: scripts/lint.sh [--changed] [FILE...]
#   no argument: every source file; --changed: what differs from the branch main; FILE...: those.
# clang-format says how files look (.clang-format), clang-tidy what may be wrong (.clang-tidy; needs a build's
# compile_commands.json, from TACTIC_BUILD_DIR or build/). Exits 1 and says where, changes nothing; `clang-format -i` formats.
# --format: formatting alone.
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "$0")/.."
build=${TACTIC_BUILD_DIR:-build}
only_format=0 changed=0 files=()
for argument in "$@"; do
  case $argument in
    --format) only_format=1 ;;
    --changed) changed=1 ;;
    -*) echo "lint: unknown option $argument" >&2; exit 2 ;;
    *) files+=("$argument") ;;
  esac
done
if [ "$changed" = 1 ]; then
  mapfile -t files < <(git diff --name-only --diff-filter=d main; git ls-files --others --exclude-standard)
elif [ ${#files[@]} = 0 ]; then
  mapfile -t files < <(find include src plugins tools eval bench tests -type f | LC_ALL=C sort)
fi
sources=() units=()
for file in "${files[@]}"; do
  [[ $file =~ \.(h|cc|c|cu|cuh)$ ]] && sources+=("$file")
  [[ $file =~ \.cc$ ]] && units+=("$file")
done

# Versions differ in small things; the tree is formatted by Debian 12's.
format=$(command -v clang-format-14 || command -v clang-format || true)
case $([ -n "$format" ] && "$format" --version) in
  *"version 14."*) ;;
  *) echo "lint: clang-format 14 is not here (Debian 12: apt install clang-format)" >&2; exit 77 ;;
esac
status=0
if [ ${#sources[@]} -gt 0 ]; then printf '%s\n' "${sources[@]}" | xargs -P "$(nproc)" -n 8 "$format" --dry-run -Werror || status=1; fi
[ "$only_format" = 1 ] && exit "$status"

tidy=$(command -v clang-tidy-14 || command -v clang-tidy || true)
[ -n "$tidy" ] || { echo "lint: clang-tidy is not here (Debian 12: apt install clang-tidy)" >&2; exit 77; }
[ -f "$build/compile_commands.json" ] || { echo "lint: $build/compile_commands.json is missing; build first" >&2; exit 2; }
# A file that the build does not compile (tests/consumer) has no command, and is left out.
built=()
for unit in "${units[@]}"; do grep -qF "\"file\": \"$PWD/$unit\"" "$build/compile_commands.json" && built+=("$unit"); done
if [ ${#built[@]} -gt 0 ]; then
  # clang 14 knows _Float16, in which benchmarks make their data, on x86 with AVX512-FP16 only.
  extra=(--extra-arg=-DHWY_COMPILE_ONLY_STATIC) half=()
  [ "$(uname -m)" = x86_64 ] && half=(--extra-arg=-mavx512fp16)
  tidy_all() { xargs -r -P "$(nproc)" -n 1 "$tidy" -p "$build" --quiet "${extra[@]}" "$@" 2>/dev/null; }
  printf '%s\n' "${built[@]}" | { grep '^bench/micro/' || true; } | tidy_all "${half[@]}" || status=1
  printf '%s\n' "${built[@]}" | { grep -v '^bench/micro/' || true; } | tidy_all || status=1
fi
exit "$status"
