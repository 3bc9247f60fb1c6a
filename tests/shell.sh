# Sourced by the tests in shell, after they set `test_name`: a folder `work` that goes away, and failures that are counted.
[ -n "${TACTIC_TEST_MODEL:-}" ] || { echo "TACTIC_TEST_MODEL is not set"; exit 77; }
export OMP_WAIT_POLICY=passive
unset TACTIC TACTIC_STATS TACTIC_PLUGIN TACTIC_TEST_ABI_MISMATCH GGML_BACKEND_PATH
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
failures=0

fail() {
  printf '%s: %s\n' "$test_name" "$*" >&2
  tail -15 "$work/err" >&2
  failures=$((failures + 1))
}
