#!/usr/bin/env bash
# Every architecture that llama.cpp knows, as a small model with random weights that llama.cpp's own test makes:
#   host_archs.sh PLUGIN LLAMA_BIN_DIR TEST_ARCHS TEST_SAVE_LOAD TACTIC
# llama.cpp's tests of architectures and of saved states pass with the plug-in; decoding with it agrees with exact attention.
set -euo pipefail
plugin=$1 archs=$3 save_load=$4 tactic=$5
test_name=host_archs
source "$(dirname "$0")/../shell.sh"
ln -s "$2"/*.so* "$work"   # loadable backends are looked for beside the program
cp "$archs" "$save_load" "$work"
archs=$work/$(basename "$archs") save_load=$work/$(basename "$save_load")
export GGML_BACKEND_PATH=$plugin

# The device in llama.cpp's comparison of backends, with few rows of a batch taken too.
TACTIC=select=dense,accept=any,min_context=0 "$archs" -s 7 -b TACTIC > "$work/out" 2> "$work/err" ||
  fail "architectures differ: $(grep -a FAIL "$work/out")"
passed=$(grep -a -c 'OK' "$work/out" || true)
echo "compared by llama.cpp: $passed"
[ "$passed" -ge 100 ] || fail "only $passed architectures were compared"

mkdir "$work/models"
"$archs" -s 7 -o "$work/models" > "$work/out" 2> "$work/err" || fail "models could not be made"
echo "models: $(ls "$work/models" | wc -l)"

TACTIC=min_context=0,accept=any "$save_load" --models "$work/models" > "$work/out" 2> "$work/err" ||
  fail "saved states differ: $(grep -a FAIL "$work/out")"
passed=$(grep -a -c PASS "$work/out" || true)
echo "states saved and restored: $passed"
[ "$passed" -ge 100 ] || fail "only $passed models had their state saved and restored"

# Token by token against exact attention. Sparse decoding of flat random heads is near exact, whatever the shape.
unset GGML_BACKEND_PATH
seq 1 2000 > "$work/text"
taken=0 declined=0
for model in "$work"/models/*.gguf; do
  name=$(basename "$model" .gguf)
  case $name in gpt2-* | starcoder-* | mpt-*) continue ;; esac   # learned positions: llama.cpp stops beyond the 256 they are made for
  status=0
  "$tactic" eval kl -m "$model" -t 1 --text "$work/text" -d 400 -n 8 --modes 'stock;quality=high' --json "$work/kl.jsonl" \
    > "$work/out" 2> "$work/err" < /dev/null || status=$?
  if [ "$status" = 0 ]; then
    taken=$((taken + 1))
  elif grep -q "the plug-in did not take this model's attention" "$work/err"; then
    declined=$((declined + 1))
    echo "left to llama.cpp: $name"
  else
    fail "$name: status $status"
  fi
done
echo "decoded: $taken, left to llama.cpp: $declined"
[ "$taken" -ge 90 ] || fail "only $taken models were decoded"
[ "$(wc -l < "$work/kl.jsonl")" = $((2 * taken)) ] || fail "$taken models gave $(wc -l < "$work/kl.jsonl") rows"
: > "$work/err"
python3 - "$work/kl.jsonl" 2> "$work/err" << 'PY' || fail "decoding differs from exact attention"
import json, sys
worst = {}
for row in map(json.loads, open(sys.argv[1])):
    if not row["mean_kl"] < 0.01: sys.stderr.write(f"{row['model']} {row['mode']}: KL {row['mean_kl']}\n")
    worst[row["mode"]] = max(worst.get(row["mode"], 0), row["mean_kl"])
print("largest mean KL:", worst)
sys.exit(not max(worst.values()) < 0.01)
PY

# Other methods, in a model of which most layers have a window: these stay exact and do not count.
"$tactic" eval kl -m "$work/models/gemma3-dense.gguf" -t 1 --text "$work/text" -d 400 -n 8 --json "$work/window.jsonl" \
  --modes 'quest,budget=64;oracle_topk,budget=100000;pyramidkv,budget=64' > "$work/out" 2> "$work/err" < /dev/null ||
  fail "baselines do not run beside windows"
python3 - "$work/window.jsonl" 2> "$work/err" << 'PY' || fail "baselines beside windows"
import json, sys
few, whole, pyramid = map(json.loads, open(sys.argv[1]))
assert few["read_fraction"] < 0.5 and few["dense_share"] == 0, few
assert whole["read_fraction"] == 1 and whole["tokens_per_kv_head"] > 400 and whole["mean_kl"] < 1e-4, whole
assert pyramid["tokens_per_kv_head"] == 4 + 64 + 64 + 4.5, pyramid  # the one full layer is the whole pyramid; 1 to 8 rows after the prompt
PY
[ "$failures" = 0 ]
