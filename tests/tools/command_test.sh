#!/usr/bin/env bash
# What a user can get wrong with the command, and what it says: command_test.sh TACTIC
# A mistake is one line on stderr that begins with "tactic:" and an exit status of 1 (of the grammar: 2), never a crash.
set -euo pipefail
tactic=$1
test_name=command_test
source "$(dirname "$0")/../shell.sh"

call() {  # STATUS [ARGUMENT...]
  local status=$1 got=0; shift
  timeout 120 "$tactic" "$@" > "$work/out" 2> "$work/err" < /dev/null || got=$?
  [ "$got" = "$status" ] || fail "status $got, not $status: tactic $*"
}
says() { grep -qF -- "$1" "$work/err" || fail "stderr does not say: $1"; }
refuses() {  # STATUS TEXT [ARGUMENT...]
  local status=$1 text=$2; shift 2
  printf '%s\n' "$text"
  call "$status" "$@"
  says "tactic: "
  says "$text"
  [ ! -s "$work/out" ] || fail "there is output on stdout: tactic $*"
}
model=$TACTIC_TEST_MODEL

refuses 1 "no verb; tactic --help shows them"
refuses 1 "no verb 'rum'; there are run, bench, eval, inspect and trace" rum -m "$model"
refuses 1 "no verb; there are kl, paper, tasks and trace" eval
refuses 1 "no verb 'foo'; there are kl, paper, tasks and trace" eval foo
refuses 1 "-m stands where a verb must: run, bench, eval, inspect and trace" -m "$model" run
refuses 1 "--foo stands where a verb must: kl, paper, tasks and trace" eval --foo kl
refuses 2 "--model is required" run --prompt x
refuses 2 "--tokens" run -m "$model" --prompt x -n 0
refuses 2 "--threads" run -m "$model" --prompt x -t 513

TACTIC_STATS=$work/none/stats call 0 run -m "$model" --prompt x -n 1
says "tactic: cannot write statistics to $work/none/stats"

# Files that are no model.
head -c 100000 /dev/urandom > "$work/garbage.gguf"
head -c 1000000 "$model" > "$work/truncated.gguf"
head -c 20 "$model" > "$work/header.gguf"
: > "$work/empty.gguf"
{ printf 'GGUF\003\0\0\0'; head -c 16 /dev/zero | tr '\0' '\377'; } > "$work/counts.gguf"   # 2^64 - 1 tensors
for name in garbage truncated header empty counts; do
  broken() { refuses 1 "$work/$name.gguf" "$@" -m "$work/$name.gguf"; }
  broken run --prompt x
  broken bench -d 64
  broken eval kl --records 0
  broken inspect --file "$0" -o "$work/page.html"
done
refuses 1 "$work/none.gguf" run --prompt x -m "$work/none.gguf"
refuses 1 "$work" run --prompt x -m "$work"

# Options of the plug-in.
refuses 1 "mode 'sampel': select=sampel is none of dense, sample, fit, topk" run -m "$model" --prompt x --tactic sampel
refuses 1 "select=high is none of dense, sample, fit, topk, off; quality=high is a preset" bench -m "$model" -d 64 --modes high
refuses 1 "quality=best: must be exact, high, balanced or fast" bench -m "$model" -d 64 --modes quality=best
refuses 1 "budget (0) must be at least 1" eval kl -m "$model" --records 0 --modes topk,budget=0
refuses 1 "cache type 'q9' is none of" run -m "$model" --prompt x --cache-type q9
refuses 1 "does not exist" run -m "$model" --prompt x --plugin "$work/none.so"
refuses 1 "error=0.02 and tau=1000 say one thing in two ways; give one" run -m "$model" --prompt x --tactic sample,error=0.02,tau=1000
refuses 1 "mode 'stock,error=3': stock takes no options" run -m "$model" --prompt x --tactic stock,error=3
refuses 1 '"quality" must be key=value' run -m "$model" --prompt x --tactic quality
refuses 2 "not expected: -n x" eval trace --traces "$work/none" -n x
refuses 1 "--select names no mode" eval trace --traces "$work/none" --select ';'
refuses 1 "--select 'sampel,error=0.02|0.04': sampel is none of" eval trace --traces "$work/none" --select 'sampel,error=0.02|0.04'
refuses 1 "--select 'sample,error=2': error (2) must be in 1e-6..1" eval trace --traces "$work/none" --select 'sample,error=2'
refuses 1 "inspect shows the plug-in's work; 'stock' has none" inspect -m "$model" --file "$0" --tactic select=off,seed=1
refuses 1 "inspect shows which rows are chosen; 'quality=exact' reads all" inspect -m "$model" --file "$0" --tactic quality=exact
refuses 1 "depth 500 and 32 steps are below min_sparse (2048)" inspect -m "$model" --file "$0" -d 500
refuses 1 "--watch-prefill needs a mode other than stock and dense" bench -m "$model" -d 64 --watch-prefill --modes 'select=off,seed=1;quality=exact'
printf 'what the plug-in says on its own\n'
TACTIC=qualty=high TACTIC_STATS=$work/none/x call 0 run -m "$model" --prompt x -n 2 -t 2 --tactic sample
[ "$(grep -cE '^tactic: (.*qualty|cannot write statistics to)' "$work/err")" = 2 ] || fail "not two lines: $(cat "$work/err")"
printf 'a safeguard taken out\n'
call 0 run -m "$model" --prompt x -n 2 -t 2 --tactic sample,fault=verify
says "tactic: fault= takes a safeguard out"
refuses 1 "did not load" run -m "$model" --prompt x --plugin "$0"

# Texts.
printf ' \n\t\n' > "$work/blank"
: > "$work/nothing"
for i in $(seq 400); do printf 'line %d of a text that is too long. ' "$i"; done > "$work/long"
refuses 1 "the prompt is empty; give --prompt or --file" run -m "$model"
refuses 1 "the prompt is empty; give --prompt or --file" run -m "$model" --prompt ""
refuses 1 "$work/blank has no text" run -m "$model" --file "$work/blank" --prompt "a question"
refuses 1 "--temp must be a number in 0..10" run -m "$model" --prompt hi --temp nan
refuses 1 "--yarn must be a number in 1..64" run -m "$model" --prompt hi --yarn nan
TACTIC=quality=best refuses 1 "quality=best: must be exact, high, balanced or fast" run -m "$model" --prompt hi
refuses 1 "cannot write /dev/null: it is there and no regular file" trace --synthetic flat-128 -o /dev/null
refuses 1 "cannot write /dev/null: it is there and no regular file" trace -m "$model" --records 0 -o /dev/null
refuses 1 "--prompt (200) must be less than the trace's 100 tokens (-n)" trace -m "$model" --records 0 -n 100 --prompt 200 -o "$work/x"
refuses 2 "--synthetic excludes --records" trace --synthetic flat-128 --records 0 -o "$work/x"
printf '{"id":"a","task":"t","prompt":"hi there","answers":["x"],"metric":"any","max_tokens":2}\n' > "$work/items"
refuses 1 "cannot write /dev/zero: it is there and no regular file" eval tasks -m "$model" --items "$work/items" -o /dev/zero
refuses 1 "cannot write $work/items: it is a file that is read" eval tasks -m "$model" --items "$work/items" -o "$work/items"
printf 'A text of some length.\n' > "$work/prose"
refuses 1 "cannot append to $work/prose: it is there and holds no JSON lines" eval tasks -m "$model" --items "$work/items" -o "$work/prose"
refuses 1 "cannot append to $work/prose: it is there and holds no JSON lines" bench -m "$model" -d 64 --file "$work/long" --json "$work/prose"
refuses 1 "cannot write $work/prose: it is a file that is read" trace -m "$model" -f "$work/prose" -n 64 -o "$work/prose"
refuses 1 "cannot write $work/prose: it is a file that is read" inspect -m "$model" --file "$work/prose" -o "$work/prose"
[ "$(cat "$work/prose")" = 'A text of some length.' ] || fail "the text has changed"
refuses 1 "cannot write $work/items: it is a file that is read" eval kl -m "$model" --text "$work/items" --json "$work/items"
refuses 1 "cannot write $work/items: it is a file that is read" bench -m "$model" -d 64 --file "$work/items" --json "$work/items"
refuses 1 "cannot write $work/items: it is a file that is read" inspect -m "$model" --file "$work/items" -o "$work/page" --json "$work/items"
refuses 1 "-o and --json name one file, $work/../${work##*/}/page" inspect -m "$model" --file "$work/prose" -o "$work/page" --json "$work/../${work##*/}/page"
refuses 1 "--modes 'quest,budget=64': other methods are of tactic eval kl and eval trace only" eval tasks -m "$model" --items "$work/items" -o "$work/x" --modes quest,budget=64
refuses 1 "min_context and min_sparse are not of traces" eval trace --traces "$work/none" --select 'topk;sample,min_sparse=4096'
printf '%s\n' '{"id":"a","task":"t","prompt":"p","answers":["x"],"metric":"foo","max_tokens":2}' \
  '{"id":"b","task":"t","prompt":"p","answers":[],"metric":"any","max_tokens":2}' \
  '{"id":"c","task":"t","prompt":"p","answers":"x","metric":"any","max_tokens":2}' \
  '{"id":"d","task":"t","prompt":"p","metric":"any","max_tokens":2}' > "$work/unscored"
refuses 1 "no items in $work/unscored" eval tasks -m "$model" --items "$work/unscored" -o "$work/x"
refuses 1 "and the context holds 256 (-c)" run -m "$model" --file "$work/long" -c 256
refuses 1 "cannot read $work/none" run -m "$model" --file "$work/none"
refuses 1 "it is a directory" run -m "$model" --file "$work"
(ulimit -v 4000000; refuses 1 "/dev/zero is larger than 1 GiB" run -m "$model" --file /dev/zero; exit "$failures") || failures=$((failures + 1))
refuses 1 "$work/blank has" eval kl -m "$model" --text "$work/blank" -d 64 -n 4
refuses 1 "tokens; 1 window(s) of depth 8000 and 4 steps need" eval kl -m "$model" --text "$work/long" -d 8000 -n 4
refuses 1 "$work/nothing has no text" bench -m "$model" --file "$work/nothing" -d 64
refuses 1 "nothing to evaluate; give --text or --records" eval kl -m "$model"
refuses 1 "'many' is not a whole number" bench -m "$model" -d many
refuses 1 "--depth: the range '1000-500:100' does not rise" bench -m "$model" -d 1000-500:100
refuses 1 "--depth, step: 0 is outside 1 to" bench -m "$model" -d 0-100:0
refuses 1 "more than 10000 numbers in '0-268435456:1'" bench -m "$model" -d 0-268435456:1

# Two answers of llama.cpp's own are no speed-up.
printf 'nothing sparse\n'
for mode in default select=off sample,seed=1; do
  call 0 run -m "$model" --prompt hi -n 12 -t 2 --compare --tactic "$mode"
  ! grep -q "decode speed against stock" "$work/err" || fail "a speed-up of nothing: $mode"
done
says "nothing was sparse, so that there is no speed to compare: the context is below min_sparse (2048)"

# What is not UTF-8 is said, replaced and gone on with.
printf 'broken \377 and cut off \342\202 here.\n' > "$work/bytes"
cat "$work/bytes" "$work/long" > "$work/bytes_long"
printf 'text that is not UTF-8\n'
call 0 run -m "$model" --file "$work/bytes" -n 2 -t 2
says "$work/bytes is not UTF-8 text: 3 byte(s) replaced by U+FFFD, the first at offset 7"
call 0 run -m "$model" --prompt "$(printf 'caf\351')" -n 2 -t 2
says "the prompt is not UTF-8 text"
call 0 eval kl -m "$model" --text "$work/bytes_long" -d 64 -n 2 -t 2 --modes dense
says "$work/bytes_long is not UTF-8 text"
call 0 bench -m "$model" --file "$work/bytes_long" -d 64 -n 2 --rounds 1 --warmup 2 -t 0,2 --modes dense
says "$work/bytes_long is not UTF-8 text"

# A line that was cut short spoils no other.
printf 'half a line\n'
printf '{"verb":"eva' > "$work/half.jsonl"
call 0 eval kl -m "$model" --records 0 -d 64 -n 2 -t 2 --modes stock --json "$work/half.jsonl"
[ "$(wc -l < "$work/half.jsonl")" = 2 ] || fail "a line is glued to the half before it"

# Few tokens say nothing of how sure their mean is.
printf 'too few tokens for an interval\n'
call 0 eval kl -m "$model" --records 0 -d 64 -n 40 -t 2 --modes stock --json "$work/few.jsonl"
grep -q '"mean_kl":0' "$work/few.jsonl" || fail "no row of the few tokens"
! grep -q mean_kl_95 "$work/few.jsonl" || fail "an interval of 40 tokens"

# Figures against each other: another method reads its index, errs, and has distributions of its own; windows differ.
printf 'figures of rows\n'
figures() { call 0 "$@"; python3 - "$work/figures.jsonl" "$work/err" 2>> "$work/err" || fail "figures: tactic $*"; rm -f "$work/figures.jsonl"; }
figures eval kl -m "$model" --text "$work/long" -d 128 -n 16 -t 2 --windows 1 --modes 'dense;recent_only' --json "$work/figures.jsonl" << 'PY'
import json, sys
one = json.loads(open(sys.argv[1]).readline())
assert one["perplexity"] == one["exact_perplexity"] and one["same_top"] == 1, one
open(sys.argv[2] + ".perplexity", "w").write(str(one["perplexity"]))
PY
figures eval kl -m "$model" --text "$work/long" -d 128 -n 16 -t 2 --windows 2 --modes 'recent_only,budget=0,recent=1,sinks=0;quest,budget=32' \
  --json "$work/figures.jsonl" << 'PY'
import json, sys
none, quest = map(json.loads, open(sys.argv[1]))
assert none["perplexity"] > none["exact_perplexity"] and none["same_top"] < 1 and none["tokens_per_kv_head"] == 1, none
assert abs(none["exact_perplexity"] / float(open(sys.argv[2] + ".perplexity").read()) - 1) > 1e-6, "the second window is the first"
present = quest["totals"]["kv_bytes_present"]
assert abs(quest["read_fraction"] - quest["tokens_per_kv_head"] / (128 + 8.5) - quest["totals"]["index_bytes"] / present) < 1e-3, quest
assert quest["totals"]["index_bytes"] > present / 32, quest
PY
figures bench -m "$model" -d 64 -n 4 --rounds 1 --warmup 2 -t 2 --modes 'stock;dense' --json "$work/figures.jsonl" << 'PY'
import json, sys
stock, dense = map(json.loads, open(sys.argv[1]))
assert stock["ratio_to_stock"] == 1, stock
assert abs(dense["ratio_to_stock"] - dense["tokens_per_second"] / stock["tokens_per_second"]) < 1e-9, dense
PY
figures run -m "$model" --file "$work/bytes" --prompt hi -n 16 -t 2 --compare --tactic quality=exact << 'PY'
import re, sys
log = open(sys.argv[2]).read()
stock, tactic = map(float, re.search(r"decode tok/s +([0-9.]+) +([0-9.]+)", log).groups())
assert abs(float(re.search("decode speed against stock: ([0-9.]+)", log)[1]) - tactic / stock) < 0.02, log
PY
refuses 1 "no exact reference: the plug-in did not take this model's attention with cache type f32" eval kl -m "$model" --records 0 \
  -d 64 -n 2 -t 2 --modes stock --cache-type f32

# Every context that YaRN extends is the same: exact attention has no distance from itself.
printf 'yarn\n'
call 0 eval kl -m "$model" --records 0 -d 64 -n 2 -t 2 --yarn 2 --modes 'dense;dense,seed=1' --json "$work/yarn.jsonl"
[ "$(grep -c '"mean_kl":0.0,' "$work/yarn.jsonl")" = 2 ] || fail "with --yarn exact attention differs from itself"

mkdir "$work/folder"
refuses 1 "cannot write $work/folder: it is a directory" trace -m "$model" --records 0 -o "$work/folder"
refuses 1 "cannot write $work/no/trace: No such file" trace -m "$model" --records 0 -o "$work/no/trace"
refuses 1 "it is a directory" eval tasks -m "$model" --items "$work/folder" -o "$work/results"
: > "$work/no_items"
refuses 1 "no items in $work/no_items" eval tasks -m "$model" --items "$work/no_items" -o "$work/results"
call 0 --version

# What ends early leaves no empty file and no half a trace.
refuses 1 "cannot write $work/folder: it is a directory" eval kl -m "$model" --records 0 --json "$work/folder"
refuses 1 "cannot write $work/no/rows.jsonl: No such file" eval kl -m "$model" --records 0 --json "$work/no/rows.jsonl"
refuses 1 "cannot read $work/none" eval kl -m "$model" --text "$work/none" --json "$work/rows.jsonl"
[ ! -e "$work/rows.jsonl" ] || fail "a run that wrote no row left $work/rows.jsonl"
printf 'the result of an earlier run\n'
call 0 trace -m "$model" --records 0 -n 64 --queries 2 --prompt-queries 2 -t 2 -o "$work/small.trace"
mkdir "$work/paper" && echo earlier > "$work/paper/paper.jsonl"
refuses 1 "holds no decode query within 0 rows after the prompt (--within)" eval trace --traces "$work/small.trace" --within 0
for layers in 0 0,0; do
  call 0 eval trace --traces "$work/small.trace" --layers "$layers" --select topk,budget=8 --json "$work/layers.jsonl"
done
call 0 eval trace --traces "$work/small.trace" --select oracle_topp,mass=0.5,recent=1,sinks=1 --worst 1 --json "$work/oracle.jsonl"
grep -q '"success":1.0' "$work/oracle.jsonl" || fail "an oracle of a mass of 0.5 is measured against another"
! grep -q -- ' -1 ' "$work/out" || fail "a row -1 is shown"
grep -q '"error_by_layer":\[[0-9.e-]*,null' "$work/layers.jsonl" || fail "a layer that was not measured has an error"
[ "$(grep -o '"cases":[0-9]*' "$work/layers.jsonl" | sort -u | wc -l)" = 1 ] || fail "a layer that is named twice counts twice"
refuses 1 "no decode query lies within 0 rows" eval paper --traces "$work/small.trace" --within 0 -o "$work/paper"
grep -q earlier "$work/paper/paper.jsonl" || fail "eval paper deleted the result of an earlier run and has no other"
part_exists() { compgen -G "$work/cut.trace.part-*" > "$work/parts"; }
for signal in INT TERM; do
  printf 'SIG%s\n' "$signal"
  [ -z "$(trap -p "$signal")" ] || { echo "ignored by the caller, and so by tactic"; continue; }
  rm -f "$work/cut.trace"
  set -m   # else what runs in the background ignores SIGINT
  "$tactic" trace --synthetic flat-128 -o "$work/cut.trace" > "$work/out" 2> "$work/err" &
  set +m
  for _ in $(seq 3000); do ! part_exists || break; sleep 0.01; done
  part_exists || fail "the trace was not begun, or written too fast to be interrupted"
  got=0
  kill -"$signal" $! && wait $! 2> "$work/wait" || got=$?
  [ "$got" = $((128 + $(kill -l "$signal"))) ] || fail "status $got after SIG$signal"
  ! part_exists && [ ! -e "$work/cut.trace" ] || fail "half a trace was left after SIG$signal"
done

printf 'a closed stdout\n'
got=0
timeout 120 "$tactic" eval kl -m "$model" --records 0 -d 64 -n 2 -t 2 --modes stock --json "$work/closed.jsonl" 2> "$work/err" >&- || got=$?
[ "$got" = 1 ] || fail "status $got, not 1, with a closed stdout"
[ "$(grep -vc '^{' "$work/closed.jsonl")" = 0 ] || fail "the report is in the JSON file"

# A full disk.
printf 'a full disk\n'
shows() { grep -qF -- "$1" "$work/out" || fail "stdout does not show: $1"; }   # what was measured is not lost
call 1 eval kl -m "$model" --records 0 -d 64 -n 2 -t 2 --modes 'dense;stock' --json /dev/full
says "cannot write /dev/full"
shows "stock"
call 1 bench -m "$model" -d 64,80 -n 2 --rounds 1 --warmup 2 -t 2 --modes dense --json /dev/full
says "cannot write /dev/full"
shows "depth 80"
call 1 eval trace --traces "$work/small.trace" --select topk,budget=8 --json /dev/full
says "cannot write /dev/full"
shows "topk,budget=8"
call 1 inspect -m "$model" --file "$work/long" -d 1200 -n 2 -t 2 --tactic min_context=1024 -o /dev/full
says "cannot write /dev/full"
got=0
timeout 120 "$tactic" run -m "$model" --prompt x -n 2 -t 2 > /dev/full 2> "$work/err" || got=$?
[ "$got" = 1 ] || fail "status $got, not 1, when the answer cannot be written"
says "cannot write the output"
! "$tactic" --help > /dev/full 2> "$work/err" || fail "--help on a full disk succeeds"
TMPDIR=$work/none call 1 eval kl -m "$model" --records 0 -d 64 -n 2 -t 2 --modes stock
says "no folder for temporary files (TMPDIR)"

[ "$failures" = 0 ]
