#!/usr/bin/env bash
# torch 2.13.0: Inductor leaves out the sum with zeros and the product with ones, also where the result is returned.
# So x + torch.zeros_like(x) is x itself once it is compiled: writing into the result writes into x. row.expand(2, 4)
# + torch.zeros(2, 4) returns the row with strides (0, 1), so that its two rows are one. In eager mode each is a
# tensor of its own, and contiguous. Clones, which Inductor leaves out too, stay where they would make a result of an
# input.
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


def plus_zero(x):
    return x + torch.zeros_like(x)


def times_one(x):
    return x * torch.ones(4)


def cloned(x):
    return x.clone()


def spread(x):
    return x.expand(2, 4) + torch.zeros(2, 4)


for function in (plus_zero, times_one, cloned, spread):
    for name, run in (("eager", function), ("compiled", torch.compile(function))):
        x = torch.arange(4.0)
        y = run(x)
        y[(0,) * y.dim()] = 7.0
        print(function.__name__, name, y.stride(), "after 7 is written: x", x.tolist(), "y", y.tolist())
PYTHON
cat > expected <<'TEXT'
plus_zero eager (1,) after 7 is written: x [0.0, 1.0, 2.0, 3.0] y [7.0, 1.0, 2.0, 3.0]
plus_zero compiled (1,) after 7 is written: x [7.0, 1.0, 2.0, 3.0] y [7.0, 1.0, 2.0, 3.0]
times_one eager (1,) after 7 is written: x [0.0, 1.0, 2.0, 3.0] y [7.0, 1.0, 2.0, 3.0]
times_one compiled (1,) after 7 is written: x [7.0, 1.0, 2.0, 3.0] y [7.0, 1.0, 2.0, 3.0]
cloned eager (1,) after 7 is written: x [0.0, 1.0, 2.0, 3.0] y [7.0, 1.0, 2.0, 3.0]
cloned compiled (1,) after 7 is written: x [0.0, 1.0, 2.0, 3.0] y [7.0, 1.0, 2.0, 3.0]
spread eager (4, 1) after 7 is written: x [0.0, 1.0, 2.0, 3.0] y [[7.0, 1.0, 2.0, 3.0], [0.0, 1.0, 2.0, 3.0]]
spread compiled (0, 1) after 7 is written: x [7.0, 1.0, 2.0, 3.0] y [[7.0, 1.0, 2.0, 3.0], [7.0, 1.0, 2.0, 3.0]]
TEXT
seen=$("$folder/venv/bin/python" -W ignore finding.py 2>/dev/null)
echo "$seen"
[ "$seen" = "$(cat expected)" ] || { echo "That differs from what was seen:"; cat expected; exit 1; }
