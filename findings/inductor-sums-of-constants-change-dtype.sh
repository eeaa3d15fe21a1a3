#!/usr/bin/env bash
# torch 2.13.0: Inductor replaces the cumulative sum of a constant tensor by a product with arange, and takes int64 for
# all integers, whatever the sum's dtype argument says. torch.ones(n, dtype=torch.int32).cumsum(0, dtype=torch.int32),
# the positions of tokens without padding, is int32 in eager mode, and int64 compiled. For a tensor that isn't constant
# the dtype is kept.
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


def constant(x):
    return torch.ones(x.shape, dtype=torch.int32).cumsum(0, dtype=torch.int32)


def variable(x):
    return x.cumsum(0, dtype=torch.int32)


x = torch.ones(8, dtype=torch.int32)
for function in (constant, variable):
    torch._dynamo.reset()
    print(f"{function.__name__}: eager {function(x).dtype}, compiled {torch.compile(function)(x).dtype}")
PYTHON
cat > expected <<'TEXT'
constant: eager torch.int32, compiled torch.int64
variable: eager torch.int32, compiled torch.int32
TEXT
seen=$("$folder/venv/bin/python" -W ignore finding.py 2>/dev/null)
echo "$seen"
[ "$seen" = "$(cat expected)" ] || { echo "That differs from what was seen:"; cat expected; exit 1; }
