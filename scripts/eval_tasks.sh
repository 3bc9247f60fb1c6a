#!/usr/bin/env bash
# Long-context tasks: make or load items, let a server answer them, sum up. docs/tasks.md; scripts/eval_tasks.sh -h.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
get_python
export PYTHONPATH=$TACTIC_ROOT/eval PYTHONDONTWRITEBYTECODE=1
exec "$PYTHON" -P -m tasks "$@"
