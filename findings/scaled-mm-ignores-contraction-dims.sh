#!/usr/bin/env bash
# torch 2.13.0: torch.nn.functional.scaled_mm checks shapes by its argument contraction_dim, "which dimensions are K in
# the matmul", and then multiplies as ever, on a CPU at least. With contraction_dim=(1, 1), which asks for a @ b.T of b
# as weights are stored, a square b gives a @ b, without a word, and any other one an error that names no dimensions.
# Dimensions that don't exist are found out, so the argument is read.
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
from torch.nn.functional import ScalingType, scaled_mm

torch.manual_seed(0)
a, square, wide = (torch.randn(shape).to(torch.float8_e4m3fn) for shape in ((32, 64), (64, 64), (48, 64)))
recipe = torch.tensor(1.0), ScalingType.TensorWise, torch.tensor(1.0), ScalingType.TensorWise
for dims in ((), (1, 0), (1, 1)):
    found = scaled_mm(a, square, *recipe, contraction_dim=dims, output_dtype=torch.float32)
    exact = {"a @ b": a.float() @ square.float(), "a @ b.T": a.float() @ square.float().T}
    print("contraction_dim", dims, *(name for name, y in exact.items() if torch.allclose(found, y, atol=1e-3)))
try:
    scaled_mm(a, wide, *recipe, contraction_dim=(1, 1), output_dtype=torch.float32)
except RuntimeError as error:
    print("b of 48 x 64:", str(error).splitlines()[0])
PYTHON
cat > expected <<'TEXT'
contraction_dim () a @ b
contraction_dim (1, 0) a @ b
contraction_dim (1, 1) a @ b
b of 48 x 64: mat_a and mat_b shapes cannot be multiplied (32x64 and 48x64)
TEXT
seen=$("$folder/venv/bin/python" -W ignore finding.py 2>/dev/null)
echo "$seen"
[ "$seen" = "$(cat expected)" ] || { echo "That differs from what was seen:"; cat expected; exit 1; }
