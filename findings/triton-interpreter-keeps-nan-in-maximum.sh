#!/usr/bin/env bash
# Triton 3.7.1: tl.maximum and tl.minimum without propagate_nan give the other number where one is NaN, on a GPU:
# compiled for sm_90 they are max.f32 and min.f32, and max.NaN.f32 with PropagateNan.ALL. With TRITON_INTERPRET=1 they
# give NaN in both cases, and so does tl.clamp; but tl.max of a row with a NaN is a number in the interpreter too. A
# kernel whose scale is tl.maximum(amax, epsilon) passes a test for NaN in the interpreter, and loses the NaN on a GPU.
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
import re

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def plainly(x_ptr, y_ptr, z_ptr):
    at = tl.arange(0, 4)
    tl.store(z_ptr + at, tl.maximum(tl.load(x_ptr + at), tl.load(y_ptr + at)))


@triton.jit
def propagating(x_ptr, y_ptr, z_ptr):
    at = tl.arange(0, 4)
    x, y = tl.load(x_ptr + at), tl.load(y_ptr + at)
    tl.store(z_ptr + at, tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL))


@triton.jit
def of_row(x_ptr, y_ptr, z_ptr):
    tl.store(z_ptr, tl.max(tl.load(x_ptr + tl.arange(0, 4)), axis=0))


x, y = torch.tensor([1.0, float("nan"), 3.0, -2.0]), torch.ones(4)
for kernel in (plainly, propagating, of_row):
    if os.environ.get("TRITON_INTERPRET") == "1":
        z = torch.zeros(4)
        kernel[(1,)](x, y, z)
        print(kernel.__name__, "interpreted:", z[:1].tolist() if kernel is of_row else z.tolist())
    else:
        signature = dict.fromkeys(("x_ptr", "y_ptr", "z_ptr"), "*fp32")
        made = triton.compile(ASTSource(kernel, signature, {}), target=GPUTarget("cuda", 90, 32))
        print(kernel.__name__, "compiled:", *sorted(set(re.findall(r"\bmax\S*\.f32", made.asm["ptx"]))))
PYTHON
cat > expected <<'TEXT'
plainly compiled: max.f32
propagating compiled: max.NaN.f32
of_row compiled: max.f32
plainly interpreted: [1.0, nan, 3.0, 1.0]
propagating interpreted: [1.0, nan, 3.0, 1.0]
of_row interpreted: [3.0]
TEXT
seen=$(
    TRITON_CACHE_DIR="$folder/cache" "$folder/venv/bin/python" -W ignore finding.py 2>/dev/null
    TRITON_INTERPRET=1 "$folder/venv/bin/python" -W ignore finding.py 2>/dev/null
)
echo "$seen"
[ "$seen" = "$(cat expected)" ] || { echo "That differs from what was seen:"; cat expected; exit 1; }
