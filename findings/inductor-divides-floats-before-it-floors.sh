#!/usr/bin/env bash
# torch 2.13.0, CPU: x // y and x % y of floats are exact in eager mode, as in Python: 1.0 // 0.1 is 9, since 0.1 is a
# little more than a tenth. Compiled by Inductor, the quotient is rounded before it is floored, and the remainder is
# made of that. So 1.0 // 0.1 is 10 and numbers fall into other bins, inf // 3 is inf instead of NaN, x % inf is NaN
# instead of x, and remainders of large float32 numbers are wrong: 1e10 % 3 is 0 instead of 1.
#
# Exit status 0: it is so today. 1: it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip --quiet --disable-pip-version-check install torch==2.13.0 numpy
cd "$folder"
cat > finding.py <<'PYTHON'
import math

import torch


def divided(x, y):
    return x // y, x % y


for dtype in (torch.float64, torch.float32):
    pairs = [(1.0, 0.1), (0.5, 0.1), (7.5, math.inf), (math.inf, 3.0), (1e10, 3.0)]
    x, y = torch.tensor(pairs, dtype=torch.float64).T.to(dtype).contiguous()
    torch._dynamo.reset()
    eager, compiled = divided(x, y), torch.compile(divided)(x, y)
    for at, (a, b) in enumerate(pairs):
        print(f"{dtype}: {a:g} // {b:g}: eager {eager[0][at]:.0f}, compiled {compiled[0][at]:.0f};", end=" ")
        print(f"{a:g} % {b:g}: eager {eager[1][at]:.1f}, compiled {compiled[1][at]:.1f}")
PYTHON
cat > expected <<'TEXT'
torch.float64: 1 // 0.1: eager 9, compiled 10; 1 % 0.1: eager 0.1, compiled 0.1
torch.float64: 0.5 // 0.1: eager 4, compiled 5; 0.5 % 0.1: eager 0.1, compiled 0.1
torch.float64: 7.5 // inf: eager 0, compiled 0; 7.5 % inf: eager 7.5, compiled nan
torch.float64: inf // 3: eager nan, compiled inf; inf % 3: eager nan, compiled nan
torch.float64: 1e+10 // 3: eager 3333333333, compiled 3333333333; 1e+10 % 3: eager 1.0, compiled 1.0
torch.float32: 1 // 0.1: eager 9, compiled 10; 1 % 0.1: eager 0.1, compiled 0.1
torch.float32: 0.5 // 0.1: eager 4, compiled 5; 0.5 % 0.1: eager 0.1, compiled 0.1
torch.float32: 7.5 // inf: eager 0, compiled 0; 7.5 % inf: eager 7.5, compiled nan
torch.float32: inf // 3: eager nan, compiled inf; inf % 3: eager nan, compiled nan
torch.float32: 1e+10 // 3: eager 3333333248, compiled 3333333248; 1e+10 % 3: eager 1.0, compiled 0.0
TEXT
seen=$("$folder/venv/bin/python" -W ignore finding.py 2>/dev/null)
echo "$seen"
[ "$seen" = "$(cat expected)" ] || { echo "That differs from what was seen:"; cat expected; exit 1; }
