#!/usr/bin/env bash
# Triton 3.7.1: tl.associative_scan along axis -1 is compiled to the same code as along the same axis counted from 0.
# With TRITON_INTERPRET=1 it accumulates nothing, and returns its input: a running maximum isn't one. tl.reduce along
# -1 with a function of one's own raises an error there. tl.cumsum, tl.sum and tl.max are right, as they have code of
# their own.
#
# Exit status 0: it is so today. 1: it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip --quiet --disable-pip-version-check install torch==2.13.0 numpy triton==3.7.1
cd "$folder"
cat > finding.py <<'PYTHON'
import os

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def scan(x_ptr, y_ptr, AXIS: tl.constexpr):
    at = tl.arange(0, 8)
    tl.store(y_ptr + at, tl.associative_scan(tl.load(x_ptr + at), AXIS, larger))


@triton.jit
def reduction(x_ptr, y_ptr, AXIS: tl.constexpr):
    tl.store(y_ptr, tl.reduce(tl.load(x_ptr + tl.arange(0, 8)), AXIS, larger))


x = torch.tensor([3.0, 1.0, 4.0, 1.0, 5.0, 9.0, 2.0, 6.0])
for kernel in (scan, reduction):
    codes = []
    for axis in (0, -1):
        if os.environ.get("TRITON_INTERPRET") == "1":
            y = torch.zeros(8 if kernel is scan else 1)
            try:
                kernel[(1,)](x, y, axis)
                print(f"{kernel.__name__} along {axis}, interpreted:", y.tolist())
            except Exception as error:
                print(f"{kernel.__name__} along {axis}, interpreted:", type(error).__name__)
        else:
            source = ASTSource(kernel, {"x_ptr": "*fp32", "y_ptr": "*fp32", "AXIS": "constexpr"}, {"AXIS": axis})
            made = triton.compile(source, target=GPUTarget("cuda", 90, 32))
            codes.append([line for line in made.asm["ptx"].splitlines() if ".loc" not in line])
    if codes:
        print(f"{kernel.__name__}, compiled: the same code along 0 and -1:", codes[0] == codes[1])
PYTHON
cat > expected <<'TEXT'
scan, compiled: the same code along 0 and -1: True
reduction, compiled: the same code along 0 and -1: True
scan along 0, interpreted: [3.0, 3.0, 4.0, 4.0, 5.0, 9.0, 9.0, 9.0]
scan along -1, interpreted: [3.0, 1.0, 4.0, 1.0, 5.0, 9.0, 2.0, 6.0]
reduction along 0, interpreted: [9.0]
reduction along -1, interpreted: InterpreterError
TEXT
seen=$(
    TRITON_CACHE_DIR="$folder/cache" "$folder/venv/bin/python" -W ignore finding.py 2>/dev/null
    TRITON_INTERPRET=1 "$folder/venv/bin/python" -W ignore finding.py 2>/dev/null
)
echo "$seen"
[ "$seen" = "$(cat expected)" ] || { echo "That differs from what was seen:"; cat expected; exit 1; }
