#!/usr/bin/env bash
# Triton 3.7.1: tl.umulhi, the high half of a product, is unsigned on a GPU, also of int32: compiled for sm_90 it is
# mul.hi.u32. With TRITON_INTERPRET=1 it takes int32 as signed numbers: the high half of -1 times -1 is 0, and -2 on a
# GPU, the bits of 4294967294. Of uint32 both agree. Random numbers and divisions by a multiplication that keep their
# state in int32 differ between the two.
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
def high(x_ptr, y_ptr):
    at = tl.arange(0, 4)
    x = tl.load(x_ptr + at)
    tl.store(y_ptr + at, tl.umulhi(x, x))


for dtype, name in ((torch.int32, "*i32"), (torch.uint32, "*u32")):
    if os.environ.get("TRITON_INTERPRET") == "1":
        x = torch.tensor([-1, -7, 7, 2**31 - 1], dtype=torch.int32).view(dtype)
        y = torch.zeros_like(x)
        high[(1,)](x, y)
        print(dtype, "interpreted:", y.view(torch.int32).tolist())
    else:
        made = triton.compile(ASTSource(high, {"x_ptr": name, "y_ptr": name}, {}), target=GPUTarget("cuda", 90, 32))
        print(dtype, "compiled:", *sorted(set(re.findall(r"\bmul\.hi[.\w]*", made.asm["ptx"]))))
PYTHON
cat > expected <<'TEXT'
torch.int32 compiled: mul.hi.u32
torch.uint32 compiled: mul.hi.u32
torch.int32 interpreted: [0, 0, 0, 1073741823]
torch.uint32 interpreted: [-2, -14, 0, 1073741823]
TEXT
seen=$(
    TRITON_CACHE_DIR="$folder/cache" "$folder/venv/bin/python" -W ignore finding.py 2>/dev/null
    TRITON_INTERPRET=1 "$folder/venv/bin/python" -W ignore finding.py 2>/dev/null
)
echo "$seen"
[ "$seen" = "$(cat expected)" ] || { echo "That differs from what was seen:"; cat expected; exit 1; }
