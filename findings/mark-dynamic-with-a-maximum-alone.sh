#!/usr/bin/env bash
# torch 2.13.0: mark_dynamic(x, 0, max=4096), whose min is optional, ends in an AssertionError about a sympy type
# when the function is compiled; with min=2 beside it the same call compiles.
#
# Exit status 0: it is so today. 1: it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip --quiet --disable-pip-version-check install torch==2.13.0 numpy
cd "$folder"
cat > finding.py <<'PYTHON'
import torch

for limits in ({"max": 4096}, {"min": 2, "max": 4096}):
    torch._dynamo.reset()
    x = torch.randn(8)
    torch._dynamo.mark_dynamic(x, 0, **limits)
    try:
        torch.compile(torch.cos, backend="eager")(x)
        print(limits, "compiled")
    except Exception as error:
        print(limits, type(error).__name__, str(error).splitlines()[0])
PYTHON
cat > expected <<'TEXT'
{'max': 4096} AssertionError not simple sympy type <class 'NoneType'>: None
{'min': 2, 'max': 4096} compiled
TEXT
seen=$("$folder/venv/bin/python" -W ignore finding.py 2>/dev/null)
echo "$seen"
[ "$seen" = "$(cat expected)" ] || { echo "That differs from what was seen:"; cat expected; exit 1; }
