#!/usr/bin/env bash
# torch 2.13.0, CPU: torch.nextafter of bfloat16 gives the next bfloat16 number. Compiled by Inductor it steps to the
# next float32, and rounds that back to bfloat16: to the number that it came from. So nothing moves, from 0 neither,
# and bounds that should be open, as half-open ranges of random numbers, aren't.
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

for dtype in (torch.float32, torch.bfloat16):
    x, up = torch.tensor([0.0, 1.0, 100.0], dtype=dtype), torch.tensor(torch.inf, dtype=dtype)
    for name, run in (("eager", torch.nextafter), ("compiled", torch.compile(torch.nextafter))):
        print(dtype, name, "moves", (run(x, up) > x).tolist())
PYTHON
cat > expected <<'TEXT'
torch.float32 eager moves [True, True, True]
torch.float32 compiled moves [True, True, True]
torch.bfloat16 eager moves [True, True, True]
torch.bfloat16 compiled moves [False, False, False]
TEXT
seen=$("$folder/venv/bin/python" -W ignore finding.py 2>/dev/null)
echo "$seen"
[ "$seen" = "$(cat expected)" ] || { echo "That differs from what was seen:"; cat expected; exit 1; }
