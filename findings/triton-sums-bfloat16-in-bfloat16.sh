#!/usr/bin/env bash
# Triton 3.7.1: tl.sum of bfloat16 or float16 adds in that dtype, and gives it: compiled for sm_90, each step of the
# reduction is a sum of two bfloat16 numbers, which have 8 bits. tl.cumsum of bfloat16 is done in float32, and so is
# tl.max, but tl.cumsum of float16 isn't. Sums of int8 and int16 are taken in int32. torch.sum of both floats adds in
# float32: a row sum that was ported without a cast loses most of its digits, and nothing says so.
#
# Exit status 0: it is so today. 1: it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip --quiet --disable-pip-version-check install torch==2.13.0 numpy triton==3.7.1
cd "$folder"
cat > finding.py <<'PYTHON'
import re

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def total(x_ptr, y_ptr):
    tl.store(y_ptr, tl.sum(tl.load(x_ptr + tl.arange(0, 256)), axis=0))


@triton.jit
def running(x_ptr, y_ptr):
    at = tl.arange(0, 256)
    tl.store(y_ptr + at, tl.cumsum(tl.load(x_ptr + at), axis=0))


@triton.jit
def largest(x_ptr, y_ptr):
    tl.store(y_ptr, tl.max(tl.load(x_ptr + tl.arange(0, 256)), axis=0))


for kernel in (total, running, largest):
    found = []
    for given in ("bf16", "fp16", "i8"):
        source = ASTSource(kernel, {"x_ptr": f"*{given}", "y_ptr": f"*{given}"}, {})
        made = triton.compile(source, target=GPUTarget("cuda", 90, 32))
        step = re.search(r"arith\.(?:addf|addi|maxnumf|maxsi) %\w+, %\w+ : (\w+)", made.asm["ttir"])
        found.append(f"{given} in {step[1]}")
    print(f"{kernel.__name__}:", ", ".join(found))
PYTHON
cat > expected <<'TEXT'
total: bf16 in bf16, fp16 in f16, i8 in i32
running: bf16 in f32, fp16 in f16, i8 in i32
largest: bf16 in f32, fp16 in f32, i8 in i32
TEXT
seen=$(TRITON_CACHE_DIR="$folder/cache" "$folder/venv/bin/python" -W ignore finding.py 2>/dev/null)
echo "$seen"
[ "$seen" = "$(cat expected)" ] || { echo "That differs from what was seen:"; cat expected; exit 1; }
