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

[ "$failures" = 0 ]
