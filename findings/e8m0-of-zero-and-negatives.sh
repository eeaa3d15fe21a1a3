#!/usr/bin/env bash
# torch 2.13.0 and ml_dtypes 0.6.0 (which JAX and ONNX use) disagree about E8M0, the scales of MX formats, which has
# neither a sign nor a zero. torch drops the sign, so -4 becomes 4, and makes 0 the smallest scale, 2**-127. ml_dtypes
# makes both NaN, and with it a whole group of 32 numbers. torch doesn't agree with itself either: zeros() and tensor()
# accept the 0 that full() and pad() refuse as an overflow, so pad() of scales fails with its own default.
#
# Exit status 0: it is so today. 1: it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip --quiet --disable-pip-version-check install torch==2.13.0 numpy ml_dtypes==0.6.0
cd "$folder"
cat > finding.py <<'PYTHON'
import ml_dtypes
import numpy as np
import torch

E8M0 = torch.float8_e8m0fnu
numbers = [4.0, -4.0, 0.0, 3.0, float("inf")]
print("numbers  ", numbers)
print("torch    ", torch.tensor(numbers).to(E8M0).float().tolist())
print("ml_dtypes", np.array(numbers, np.float32).astype(ml_dtypes.float8_e8m0fnu).astype(np.float32).tolist())
makers = {
    "zeros": lambda: torch.zeros(1, dtype=E8M0),
    "tensor": lambda: torch.tensor([0.0], dtype=E8M0),
    "full": lambda: torch.full((2,), 0.0, dtype=E8M0)[:1],
    "pad": lambda: torch.nn.functional.pad(torch.tensor([1.0]).to(E8M0), (0, 1))[1:],
}
for name, make in makers.items():
    try:
        print(f"{name}: 2**{int(make().view(torch.uint8)) - 127}")
    except RuntimeError as error:
        print(f"{name}: {error}")
PYTHON
cat > expected <<'TEXT'
numbers   [4.0, -4.0, 0.0, 3.0, inf]
torch     [4.0, 4.0, 5.877471754111438e-39, 4.0, nan]
ml_dtypes [4.0, nan, nan, 4.0, nan]
zeros: 2**-127
tensor: 2**-127
full: value cannot be converted to type c10::Float8_e8m0fnu without overflow
pad: value cannot be converted to type c10::Float8_e8m0fnu without overflow
TEXT
seen=$("$folder/venv/bin/python" -W ignore finding.py 2>/dev/null)
echo "$seen"
[ "$seen" = "$(cat expected)" ] || { echo "That differs from what was seen:"; cat expected; exit 1; }
