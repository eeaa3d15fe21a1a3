#!/usr/bin/env bash
# Triton 3.6.0 and 3.7.1: under TRITON_INTERPRET=1, `tl.fma(a, b, c)` rounds the product before it adds. On a GPU it is
# one fused multiply-add. Code whose point is the single rounding, such as the remainder that corrects a quotient, gives
# 0 in the interpreter: (1 + 2^-12)^2 - (1 + 2^-11) is 2^-24, and 0.0 is seen. A kernel that is right on a GPU fails its
# tests in the interpreter, or the other way round.
#
# Exit status 0: it is so today. 1: it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip --quiet --disable-pip-version-check install torch==2.13.0 numpy
cat > "$folder/finding.py" <<'PYTHON'
import torch
import triton
import triton.language as tl


@triton.jit
def fused(a_ptr, b_ptr, c_ptr, out_ptr):
    tl.store(out_ptr, tl.fma(tl.load(a_ptr), tl.load(b_ptr), tl.load(c_ptr)))


a, c, out = torch.tensor([1 + 2**-12]), torch.tensor([-(1 + 2**-11)]), torch.empty(1)
fused[(1,)](a, a, c, out)
print(triton.__version__, "interpreted:", out.item(), "exactly:", 2**-24)
raise SystemExit(out.item() != 0.0)
PYTHON
for version in 3.6.0 3.7.1; do
  "$folder/venv/bin/python" -m pip --quiet --disable-pip-version-check install --no-deps "triton==$version"
  TRITON_INTERPRET=1 "$folder/venv/bin/python" "$folder/finding.py"
done
