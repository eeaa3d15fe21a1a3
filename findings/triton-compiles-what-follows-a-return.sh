#!/usr/bin/env bash
# Triton 3.7.1, compiled for sm_90: a function goes on behind a return that is taken, if the return stands under a
# condition of constexpr. What follows is compiled though nothing reaches it: a return of another dtype raises "Return
# type mismatch", and a tl.static_assert behind the return, which rules the case out, fails. With an else, which the
# compiler leaves out, and in the interpreter (TRITON_INTERPRET=1) both are right, and a return without a condition does
# end a function. So code that is written with early returns, as in Python, works under the interpreter alone.
#
# Exit status 0: it is so today. 1: it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip --quiet --disable-pip-version-check install torch==2.13.0 triton==3.7.1 numpy==2.4.6
cd "$folder"
cat > finding.py <<'PYTHON'
import os

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def early(x, HALF: tl.constexpr):
    if HALF:
        return x.to(tl.float16)
    return x.to(tl.float32)


@triton.jit
def ruled_out(x, HALF: tl.constexpr):
    if HALF:
        return x.to(tl.float16)
    tl.static_assert(not HALF, "behind a return")
    return x.to(tl.float16)


@triton.jit
def with_else(x, HALF: tl.constexpr):
    if HALF:
        return x.to(tl.float16)
    else:
        return x.to(tl.float32)


@triton.jit
def unconditional(x, HALF: tl.constexpr):
    return x.to(tl.float16)
    return x.to(tl.float32)


@triton.jit
def kernel(source, target, FUNCTION: tl.constexpr, HALF: tl.constexpr):
    places = tl.arange(0, 32)
    tl.store(target + places, FUNCTION(tl.load(source + places), HALF).to(tl.float32))


signature = {"source": "*fp32", "target": "*fp32", "FUNCTION": "constexpr", "HALF": "constexpr"}
interpreted = os.environ.get("TRITON_INTERPRET") == "1"
for name in ("early", "ruled_out", "with_else", "unconditional"):
    try:
        if interpreted:
            source, target = torch.rand(32), torch.empty(32)
            kernel[(1,)](source, target, globals()[name], True)
            outcome = f"runs, right {torch.equal(target, source.half().float())}"
        else:
            ast = ASTSource(kernel, signature, {(2,): globals()[name], (3,): True})
            triton.compile(ast, target=GPUTarget("cuda", 90, 32))
            outcome = "compiles"
    except Exception as error:
        while error.__cause__ is not None:
            error = error.__cause__
        outcome = str(error).splitlines()[-1].partition(":")[0]
    print("interpreted" if interpreted else "compiled", name, outcome)
PYTHON
cat > expected <<'TEXT'
compiled early TypeError("Return type mismatch
compiled ruled_out behind a return
compiled with_else compiles
compiled unconditional compiles
interpreted early runs, right True
interpreted ruled_out runs, right True
interpreted with_else runs, right True
interpreted unconditional runs, right True
TEXT
seen=$(
    TRITON_CACHE_DIR="$folder/cache" "$folder/venv/bin/python" -W ignore finding.py 2>/dev/null
    TRITON_INTERPRET=1 "$folder/venv/bin/python" -W ignore finding.py 2>/dev/null
)
echo "$seen"
[ "$seen" = "$(cat expected)" ] || { echo "That differs from what was seen:"; cat expected; exit 1; }
