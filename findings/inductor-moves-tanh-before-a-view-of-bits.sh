#!/usr/bin/env bash
# torch 2.13.0: Inductor moves relu and tanh from behind a concatenation to its parts, also across a view between
# them. A view to another dtype is a view too: torch.cat([a, b]).view(torch.float32).tanh() of int32, as bits come out
# of a file or a buffer, takes the tanh of the integers, and 0.5 becomes 1. Bytes viewed as float16 keep their
# negative numbers behind relu. Nothing is warned.
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


def squashed(a, b):
    return torch.cat([a, b]).view(torch.float32).tanh()


def rectified(a, b):
    return torch.cat([a, b]).view(torch.float16).relu()


x = torch.tensor([0.5, -1.0, 2.0, -0.25])
bits = {squashed: x.view(torch.int32).split(2), rectified: x.half().view(torch.uint8).split(4)}
for function, (a, b) in bits.items():
    for name, run in (("eager", function), ("compiled", torch.compile(function))):
        print(function.__name__, name, [round(number, 4) for number in run(a, b).tolist()])
PYTHON
cat > expected <<'TEXT'
squashed eager [0.4621, -0.7616, 0.964, -0.2449]
squashed compiled [1.0, -1.0, 1.0, -1.0]
rectified eager [0.5, 0.0, 2.0, 0.0]
rectified compiled [0.5, -1.0, 2.0, -0.25]
TEXT
seen=$("$folder/venv/bin/python" -W ignore finding.py 2>/dev/null)
echo "$seen"
[ "$seen" = "$(cat expected)" ] || { echo "That differs from what was seen:"; cat expected; exit 1; }
