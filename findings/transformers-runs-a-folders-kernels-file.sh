#!/usr/bin/env bash
# transformers 5.23.0: a file kernels.py beside a script is taken for the package of kernels from the hub, which isn't
# installed here, and runs when any model or configuration is imported: a folder of benchmarks often has such a file.
#
# Exit status 0: it is so today. 1: it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip --quiet --disable-pip-version-check install torch==2.13.0 numpy transformers==5.23.0
cd "$folder"
echo 'print("kernels.py of this folder runs")' > kernels.py
cat > finding.py <<'PYTHON'
from transformers import LlamaConfig

print(LlamaConfig(num_hidden_layers=1).model_type)
PYTHON
cat > expected <<'TEXT'
kernels.py of this folder runs
llama
TEXT
seen=$("$folder/venv/bin/python" -W ignore finding.py 2>/dev/null)
echo "$seen"
[ "$seen" = "$(cat expected)" ] || { echo "That differs from what was seen:"; cat expected; exit 1; }
