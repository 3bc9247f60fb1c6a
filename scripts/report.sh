#!/usr/bin/env bash
# The report on methods: DIR/*.jsonl (and more files) become DIR/report.html, report.md and pictures.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
get_python
export PYTHONPATH=$TACTIC_ROOT/eval PYTHONDONTWRITEBYTECODE=1
exec "$PYTHON" -P -m report "$@"
