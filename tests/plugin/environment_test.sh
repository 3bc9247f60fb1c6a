#!/usr/bin/env bash
# What a user can get wrong, through the host's own programs: environment_test.sh PLUGIN LLAMA_BIN_DIR OTHER_GGML
set -euo pipefail
plugin=$1 bin=$2
test_name=environment_test
source "$(dirname "$0")/../shell.sh"
export GGML_BACKEND_PATH=$plugin

ask() {  # NAME [VARIABLE=VALUE...]: a short greedy answer; its text in $work/out, the log in $work/err
  local name=$1; shift
  printf '%s\n' "$name"
  env "$@" timeout 120 "$bin/llama-completion" -m "$TACTIC_TEST_MODEL" -p "The capital of France is" -n 24 -c 1024 --temp 0 \
    -t 2 -no-cnv --no-warmup --no-display-prompt < /dev/null > "$work/out" 2> "$work/err" || fail "$name: exit code $?"
  [ -s "$work/out" ] || fail "$name: no answer"
}
lines() { grep -c -- "$1" "$work/err" || true; }
log_has() { grep -q -- "$1" "$work/err" || fail "the log does not say: $1"; }
answer_is_normal() { cmp -s "$work/out" "$work/expected" || fail "the answer differs: $(cat "$work/out")"; }

ask "the host alone" -u GGML_BACKEND_PATH
cp "$work/out" "$work/expected"

ask "a wrong value" TACTIC=quality=hihg
[ "$(lines hihg)" = 1 ] || fail "the wrong value is named $(lines hihg) times"
log_has "must be exact, high, balanced or fast"
answer_is_normal

ask "two accuracies" TACTIC=error=0.02,tau=1000
[ "$(lines 'error=0.02 and tau=1000')" = 1 ] || fail "the two keys are named $(lines 'error=0.02 and tau=1000') times"
log_has "going on with the host's dense attention"
answer_is_normal

ask "a wrong key" TACTIC=qualty=high
[ "$(lines 'unknown key "qualty"')" = 1 ] || fail "the wrong key is named $(lines qualty) times"
answer_is_normal

ask "an option of the tests" TACTIC=fault=mask
[ "$(lines 'takes a safeguard out')" = 1 ] || fail "the fault is named $(lines 'takes a safeguard out') times"

ask "another ggml" TACTIC_TEST_ABI_MISMATCH="tensors have another size"
log_has "tensors have another size"
log_has "TACTIC_LLAMA_DIR"
answer_is_normal

ask "a ggml of other types" LD_PRELOAD="$3" TACTIC=min_context=0,quality=exact TACTIC_STATS="$work/stats_other"
log_has "types have other numbers"
[ ! -e "$work/stats_other" ] || fail "the plug-in was loaded"
answer_is_normal

sparse=TACTIC=min_context=0,segment=512,provisional=64
ask "a full disk" $sparse TACTIC_STATS=/dev/full
[ "$(lines 'cannot write statistics')" = 1 ] || fail "the full disk is named $(lines 'cannot write statistics') times"

ask "statistics nowhere" $sparse TACTIC_STATS="$work/no/such/folder"
[ "$(lines 'cannot write statistics')" = 1 ] || fail "the missing folder is named $(lines 'cannot write statistics') times"

mkfifo "$work/no_reader"
ask "statistics into a pipe that nobody reads" $sparse TACTIC_STATS="$work/no_reader"
[ "$(lines 'cannot write statistics')" = 1 ] || fail "the pipe is named $(lines 'cannot write statistics') times"

for quality in high exact; do
ask "statistics of $quality" "$sparse,quality=$quality" TACTIC_STATS="$work/stats_$quality"
python3 - "$work/stats_$quality" <<'PY' || fail "the statistics of $quality are no good"
import json, sys
steps = [json.loads(line) for line in open(sys.argv[1])]
assert len(steps) >= 20, f"{len(steps)} steps"
assert [s["step"] for s in steps] == list(range(len(steps))), "steps are numbered"
assert all(s["layers"] == 30 and s["queries"] == 30 for s in steps), "a step has 30 layers"
assert all(s["kv_bytes"] > 0 for s in steps), "bytes read"
PY
done

ask "a cache of another type" $sparse LLAMA_ARG_CACHE_TYPE_K=q5_0 LLAMA_ARG_CACHE_TYPE_V=q5_0
[ "$(lines 'a cache of type q5_0 is not supported')" = 1 ] || fail "the type is named $(lines 'a cache of type') times"

printf 'a server with three slots\n'
python3 "$(dirname "$0")/server_test.py" "$bin/llama-server" "$TACTIC_TEST_MODEL" 2> "$work/err" || fail "the server"

[ "$failures" = 0 ]
