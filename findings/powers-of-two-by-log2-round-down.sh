#!/usr/bin/env bash
# torch 2.13.0, CPU: `exp2(ceil(log2(s)))`, by which libraries round scales of fp8 up to powers of two (UE8M0), rounds down
# where s is a little above a power of two: log2 has no room for the difference. So a scale can be smaller than the one
# that was asked for, and the largest codes of its group saturate. `frexp` has the exact exponent.
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

for power in (0, -8, -100):
    scale = torch.tensor(2.0**power)
    below = 0
    while True:
        scale = torch.nextafter(scale, torch.tensor(torch.inf))
        if torch.exp2(torch.ceil(torch.log2(scale))) >= scale:
            break
        below += 1
    exponent = int(torch.frexp(torch.nextafter(torch.tensor(2.0**power), torch.tensor(torch.inf))).exponent)
    print(f"above 2**{power}, rounded down to it: {below} numbers; by frexp the first is rounded to 2**{exponent}")
PYTHON
cat > expected <<'TEXT'
above 2**0, rounded down to it: 0 numbers; by frexp the first is rounded to 2**1
above 2**-8, rounded down to it: 1 numbers; by frexp the first is rounded to 2**-7
above 2**-100, rounded down to it: 22 numbers; by frexp the first is rounded to 2**-99
TEXT
seen=$("$folder/venv/bin/python" -W ignore finding.py 2>/dev/null)
echo "$seen"
[ "$seen" = "$(cat expected)" ] || { echo "That differs from what was seen:"; cat expected; exit 1; }
