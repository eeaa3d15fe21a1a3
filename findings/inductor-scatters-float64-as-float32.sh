#!/usr/bin/env bash
# torch 2.13.0: Inductor turns a number that is scattered into a constant tensor into torch.where of two Python
# numbers, which is float32, and then casts to the tensor's dtype. torch.full(..., 0.05,
# dtype=torch.float64).scatter(1, labels, 0.85), smoothed labels, holds 0.05000000074505806 once it is compiled:
# float64 of float32's precision.
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


def smoothed(labels, dtype):
    return torch.full((len(labels), 4), 0.05, dtype=dtype).scatter(1, labels[:, None], 0.85)


labels = torch.tensor([1, 3])
for dtype in (torch.float32, torch.float64):
    torch._dynamo.reset()
    eager, compiled = smoothed(labels, dtype), torch.compile(smoothed)(labels, dtype)
    print(dtype, "eager", eager[0, :2].tolist(), "compiled", compiled[0, :2].tolist())
PYTHON
cat > expected <<'TEXT'
torch.float32 eager [0.05000000074505806, 0.8500000238418579] compiled [0.05000000074505806, 0.8500000238418579]
torch.float64 eager [0.05, 0.85] compiled [0.05000000074505806, 0.8500000238418579]
TEXT
seen=$("$folder/venv/bin/python" -W ignore finding.py 2>/dev/null)
echo "$seen"
[ "$seen" = "$(cat expected)" ] || { echo "That differs from what was seen:"; cat expected; exit 1; }
