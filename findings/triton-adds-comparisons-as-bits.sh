#!/usr/bin/env bash
# Triton 3.7.1: a sum of two comparisons, (x > 0) + (x > 1), is a sum of single bits on a GPU: compiled for sm_90 it
# is one xor, and true plus true is false. With TRITON_INTERPRET=1 true plus true is true, as in torch. Their
# difference and their negation compile, and raise a TypeError in the interpreter. So counting conditions, or joining
# masks by a plus, passes tests in the interpreter and is wrong on a GPU, without a word.
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
def plus(x_ptr, y_ptr):
    at = tl.arange(0, 4)
    x = tl.load(x_ptr + at)
    tl.store(y_ptr + at, ((x > 0) + (x > 1)).to(tl.int32))


@triton.jit
def minus(x_ptr, y_ptr):
    at = tl.arange(0, 4)
    x = tl.load(x_ptr + at)
    tl.store(y_ptr + at, ((x > 0) - (x > 1)).to(tl.int32))


x, y = torch.tensor([-1.0, 1.0, 2.0, 3.0]), torch.zeros(4, dtype=torch.int32)
for kernel in (plus, minus):
    if os.environ.get("TRITON_INTERPRET") == "1":
        try:
            kernel[(1,)](x, y)
            print(kernel.__name__, "interpreted:", y.tolist())
        except Exception as error:
            print(kernel.__name__, "interpreted:", str(error)[:33])
    else:
        source = ASTSource(kernel, {"x_ptr": "*fp32", "y_ptr": "*i32"}, {})
        made = triton.compile(source, target=GPUTarget("cuda", 90, 32))
        steps = re.findall(r"(arith\.(?:addi|subi)) .* : tensor<4x(i1)>", made.asm["ttir"])
        print(kernel.__name__, "compiled:", *(" of ".join(step) for step in steps), end=", ")
        print("in PTX:", *sorted(set(re.findall(r"\b(?:xor|or|add)\.(?:pred|b16|s16)\b", made.asm["ptx"]))))
if os.environ.get("TRITON_INTERPRET") == "1":
    print("torch:", ((x > 0) + (x > 1)).int().tolist())
PYTHON
cat > expected <<'TEXT'
plus compiled: arith.addi of i1, in PTX: xor.pred
minus compiled: arith.subi of i1, in PTX: xor.pred
plus interpreted: [0, 1, 1, 1]
minus interpreted: TypeError('numpy boolean subtract
torch: [0, 1, 1, 1]
TEXT
seen=$(
    TRITON_CACHE_DIR="$folder/cache" "$folder/venv/bin/python" -W ignore finding.py 2>/dev/null
    TRITON_INTERPRET=1 "$folder/venv/bin/python" -W ignore finding.py 2>/dev/null
)
echo "$seen"
[ "$seen" = "$(cat expected)" ] || { echo "That differs from what was seen:"; cat expected; exit 1; }
