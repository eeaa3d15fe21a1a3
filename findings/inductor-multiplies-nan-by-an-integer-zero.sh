#!/usr/bin/env bash
# torch 2.13.0: Inductor replaces a product with the integer 0 by zeros, also of floats, where NaN and infinity times 0
# are NaN. x * 0, 0 * x and x * False compile to 0 for NaN; x * 0.0 to NaN. torch.addcdiv(y, x, z, value=0) falls under
# it too, and loses the NaN of x. So a product that should carry NaN on to a check, or into a sum, doesn't once it is
# compiled.
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

x = torch.tensor([float("nan"), float("inf"), 1.0])
functions = {
    "x * 0": lambda x: x * 0,
    "x * False": lambda x: x * False,
    "x * 0.0": lambda x: x * 0.0,
    "addcdiv(1, x, 1, value=0)": lambda x: torch.addcdiv(torch.ones(3), x, torch.ones(3), value=0),
}
for name, function in functions.items():
    torch._dynamo.reset()
    print(f"{name}: eager {function(x).tolist()}, compiled {torch.compile(function)(x).tolist()}")
PYTHON
cat > expected <<'TEXT'
x * 0: eager [nan, nan, 0.0], compiled [0.0, 0.0, 0.0]
x * False: eager [nan, nan, 0.0], compiled [0.0, 0.0, 0.0]
x * 0.0: eager [nan, nan, 0.0], compiled [nan, nan, 0.0]
addcdiv(1, x, 1, value=0): eager [nan, nan, 1.0], compiled [1.0, 1.0, 1.0]
TEXT
seen=$("$folder/venv/bin/python" -W ignore finding.py 2>/dev/null)
echo "$seen"
[ "$seen" = "$(cat expected)" ] || { echo "That differs from what was seen:"; cat expected; exit 1; }
