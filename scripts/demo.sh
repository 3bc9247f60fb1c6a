#!/usr/bin/env bash
# The main job on real input: a question about a long text, answered by stock llama.cpp and with Tactic, side by side.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/build.sh"
LICENSE_TEXT=/usr/share/common-licenses/GPL-3
TEXT=${1:-$LICENSE_TEXT}
[ -f "$TEXT" ] && [ -r "$TEXT" ] || { echo "demo: $TEXT cannot be read" >&2; exit 1; }
build -DTACTIC_BUILD_TESTS=OFF -DTACTIC_BUILD_BENCH=OFF -DTACTIC_BUILD_CUDA=OFF
QUESTION="In two sentences: what is this text about?"
[ "$TEXT" != "$LICENSE_TEXT" ] || QUESTION="In two sentences: what must a person who distributes copies of a program under this license give to the recipients?"
PROMPT=${2:-$QUESTION}
say "Asking about $TEXT"
exec "$BUILD_DIR/bin/tactic" run -m "$MODEL" --file "$TEXT" --prompt "$PROMPT" -n 96 --compare
