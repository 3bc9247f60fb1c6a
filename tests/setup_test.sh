#!/usr/bin/env bash
# scripts/setup.sh, with stand-ins for what installs and fetches: setup_test.sh SOURCE_DIR
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
failures=0
fail() { printf 'setup_test: %s\n' "$*" >&2; failures=$((failures + 1)); }

tree=$work/tree
mkdir -p "$work/scripts" "$work/tmp" "$tree/eval"   # cd would find the first by CDPATH
cp -r "$1/scripts" "$tree"
cp "$1/eval/requirements.txt" "$tree/eval"
stand_ins='
locked() { ! flock -n "$TACTIC_CACHE/lock" true; }
install_packages() { locked && touch "$TACTIC_CACHE/packages"; }
pip_download() { locked && touch "$3/half" "$TACTIC_CACHE/asked"; return 1; }   # interrupted
'
run() {  # CODE after sourcing setup.sh, in the tree's folder
  (cd "$tree" && env CDPATH="$work" TACTIC_CACHE=cache HOME="$work" TMPDIR="$work/tmp" bash -c "source scripts/setup.sh; $stand_ins $1" 2> "$work/err")
}

found=$(run 'echo "$TACTIC_ROOT $TACTIC_CACHE"') || fail "setup.sh cannot be sourced: $(cat "$work/err")"
[ "$found" = "$tree $tree/cache" ] || fail "the root and the cache are $found"

# What counts is the package of this architecture, whatever others have it too.
packages() {  # "STATE ARCHITECTURE" of each that has a package; fails where any would be installed
  (cd "$tree" && export TACTIC_CACHE=cache have=$1 && bash -c 'source scripts/setup.sh
    dpkg() { echo amd64; }
    dpkg-query() { echo "$have"; }
    as_root() { exit 3; }
    install_packages' 2> "$work/err")
}
packages $'installed amd64\ninstalled arm64' && packages 'installed all' || fail "installed packages are installed again"
! packages 'installed arm64' && ! packages 'not-installed amd64' || fail "missing packages are not installed"

begun() {  # CODE: it fails where it fetches, under the lock, and leaves nothing
  rm -rf "$tree/cache"
  ! run "$1" || fail "nothing was fetched, and it went on: $1"
  [ -e "$tree/cache/$2" ] || fail "not under the lock: $1: $(cat "$work/err")"
  [ "$(ls -A "$work/tmp")" = "" ] && [ ! -e "$tree/cache/download" ] || fail "a half download is left: $1"
}
begun 'lock_setup; get_model' asked
begun 'source() { :; }; . scripts/get_gemma.sh' packages
begun 'source() { :; }; . scripts/get_gemma.sh' asked
begun 'say() { exit 1; }; get_python' packages
begun 'setup' packages
begun 'unset TACTIC_LLAMA_DIR; lock_setup; (add_processor_flags; mkdir -p "$TACTIC_CACHE/llama.cpp-0.3.36-$(llama_key)"); get_llama' asked   # half a build

holds() {  # CODE
  rm -rf "$tree/cache"; mkdir -p "$tree/cache"
  run "$1" || fail "$1: $(cat "$work/err")"
}
# Only what has the right sum is kept, and what was downloaded is held to its sum by pip.
holds 'echo right > file; keep_model file "$(sha256sum file | cut -c1-64)" "$TACTIC_CACHE/models/m"; [ "$(cat "$TACTIC_CACHE/models/m")" = right ]'
holds 'echo wrong > file; ! (keep_model file "$MODEL_SHA256" "$TACTIC_CACHE/models/m") && [ ! -e "$TACTIC_CACHE/models/m" ]'
grep -q "does not have the sha256" "$work/err" || fail "a wrong file is not named: $(cat "$work/err")"
holds 'source scripts/setup.sh; mkdir -p "$TACTIC_CACHE/venv-download/bin"; touch "$TACTIC_CACHE/venv-download/ok"
  printf "#!/bin/sh\necho \"\$@\" > \"%s/asked\"\n" "$TACTIC_CACHE" > "$TACTIC_CACHE/venv-download/bin/pip"; chmod +x "$TACTIC_CACHE/venv-download/bin/pip"
  pip_download a==1 123 "$TACTIC_CACHE/x"; grep -q -- --require-hashes "$TACTIC_CACHE/asked"; grep -qx "a==1 --hash=sha256:123" "$TACTIC_CACHE/x/requirements.txt"'
# Other flags are another build; a second set-up waits for the first.
holds '[ "$(llama_key)" != "$(LLAMA_FLAGS+=(-DOTHER=ON); llama_key)" ]'
holds '(flock 8; echo 4242 >&8; sleep 1; touch "$TACTIC_CACHE/done") 8> "$TACTIC_CACHE/lock" & sleep 0.3; lock_setup; [ -e "$TACTIC_CACHE/done" ]
  [ "$(cat "$TACTIC_CACHE/lock")" = $$ ]'
grep -q "another set-up to end: process 4242" "$work/err" || fail "who holds the lock is not named: $(cat "$work/err")"

[ "$failures" = 0 ]
