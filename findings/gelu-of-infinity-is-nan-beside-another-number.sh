#!/usr/bin/env bash
# torch 2.13.0, x86 CPU: torch.nn.functional.gelu of infinity, of float32 and bfloat16, is infinity for one number
# alone, and NaN for two or more, which oneDNN computes. Without oneDNN, with approximate="tanh", in float64, and
# compiled by Inductor it is infinity, which is what x * Phi(x) says. So one overflow is found as infinity in some
# runs and as NaN in others, and eager and compiled models differ.
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
from torch.nn.functional import gelu

for dtype in (torch.float32, torch.bfloat16, torch.float64):
    x = torch.full((2,), torch.inf, dtype=dtype)
    with torch.backends.mkldnn.flags(enabled=False):
        without = gelu(x)
    found = {"one": gelu(x[:1]), "two": gelu(x), "without oneDNN": without, "tanh": gelu(x, approximate="tanh")}
    torch._dynamo.reset()
    found["compiled"] = torch.compile(gelu)(x)
    print(dtype, {name: each[-1].item() for name, each in found.items()})
PYTHON
cat > expected <<'TEXT'
torch.float32 {'one': inf, 'two': nan, 'without oneDNN': inf, 'tanh': inf, 'compiled': inf}
torch.bfloat16 {'one': inf, 'two': nan, 'without oneDNN': inf, 'tanh': inf, 'compiled': inf}
torch.float64 {'one': inf, 'two': inf, 'without oneDNN': inf, 'tanh': inf, 'compiled': inf}
TEXT
seen=$("$folder/venv/bin/python" -W ignore finding.py 2>/dev/null)
echo "$seen"
[ "$seen" = "$(cat expected)" ] || { echo "That differs from what was seen:"; cat expected; exit 1; }
