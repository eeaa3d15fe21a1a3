#!/usr/bin/env bash
# Triton 3.7.1 with TRITON_INTERPRET=1: `tl.dot` of bfloat16 multiplies the numbers' bits as integers. The identity times
# itself has 264257536 on its diagonal, which is 0x3F80 squared; in float16 it has 1. Nothing is raised or warned.
#
# Exit status 0: it is so today. 1: it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip --quiet --disable-pip-version-check install torch==2.13.0 triton==3.7.1 numpy
cd "$folder"
cat > finding.py <<'PYTHON'
import torch
import triton
import triton.language as tl


@triton.jit
def product(x_ptr, y_ptr, z_ptr):
    at = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
    tl.store(z_ptr + at, tl.dot(tl.load(x_ptr + at), tl.load(y_ptr + at)))


for dtype in (torch.float16, torch.bfloat16):
    x, z = torch.eye(16, dtype=dtype), torch.empty(16, 16)
    product[(1,)](x, x, z)
    print(dtype, z[0, 0].item(), z[0, 1].item())
PYTHON
cat > expected <<'TEXT'
torch.float16 1.0 0.0
torch.bfloat16 264257536.0 0.0
TEXT
seen=$(TRITON_INTERPRET=1 "$folder/venv/bin/python" -W ignore finding.py 2>/dev/null)
echo "$seen"
[ "$seen" = "$(cat expected)" ] || { echo "That differs from what was seen:"; cat expected; exit 1; }
