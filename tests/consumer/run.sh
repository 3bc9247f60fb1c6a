#!/usr/bin/env bash
# Installs the built project into a temporary prefix and builds a project against it: run.sh SOURCE_DIR BUILD_DIR
set -euo pipefail
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
cmake --install "$2" --prefix "$tmp/prefix" > "$tmp/install.log"
cmake -S "$1/tests/consumer" -B "$tmp/build" -DCMAKE_PREFIX_PATH="$tmp/prefix" -DCMAKE_BUILD_TYPE=Release > "$tmp/configure.log"
cmake --build "$tmp/build" > "$tmp/build.log" || { cat "$tmp/build.log"; exit 1; }
"$tmp/build/consumer_cpp"
"$tmp/build/consumer_c"
mkdir "$tmp/c"
printf '%s\n' 'cmake_minimum_required(VERSION 3.25)' 'project(c LANGUAGES C)' 'find_package(tactic REQUIRED)' > "$tmp/c/CMakeLists.txt"
if cmake -S "$tmp/c" -B "$tmp/c/build" -DCMAKE_PREFIX_PATH="$tmp/prefix" > "$tmp/c.log" 2>&1; then echo "a project in C alone is not told"; exit 1; fi
tr -s ' \n' ' ' < "$tmp/c.log" | grep -F 'name both languages' > /dev/null || { cat "$tmp/c.log"; exit 1; }
if [ -e "$tmp/build/consumer_cuda" ]; then "$tmp/build/consumer_cuda"; fi
if [ -e "$tmp/prefix/bin/tactic" ]; then
  "$tmp/prefix/bin/tactic" --help > /dev/null
  ls "$tmp/prefix/lib/libggml-tactic.so" "$tmp"/prefix/lib/tactic/libggml-cpu*.so
  libraries=$(ldd "$tmp/prefix/bin/tactic" | grep -E 'libllama|libggml')
  if grep -v "$tmp/prefix" <<< "$libraries"; then echo "these libraries are not the installed ones"; exit 1; fi
fi
