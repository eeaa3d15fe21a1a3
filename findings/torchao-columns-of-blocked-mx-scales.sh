#!/usr/bin/env bash
# torchao 0.18.0: columns of a weight whose scales are in blocks of 128 x 4 (is_swizzled_scales=True, what tensor cores
# take) can be sliced in NVFP4, as tensor parallelism by rows needs, and not in MXFP8 or MXFP4: the slice counts scales
# as if each were of 16 numbers, and reading it raises an error about a shape. Rows can be sliced in all three.
#
# Exit status 0: it is so today. 1: it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip --quiet --disable-pip-version-check install torch==2.13.0 numpy torchao==0.18.0
cd "$folder"
cat > finding.py <<'PYTHON'
import torch
from torchao.prototype.mx_formats.mx_tensor import MXTensor
from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor

torch.manual_seed(0)
x = torch.randn(256, 512)
tensors = {
    "NVFP4": NVFP4Tensor.to_nvfp4(x, is_swizzled_scales=True),
    "MXFP8": MXTensor.to_mx(x, torch.float8_e4m3fn, is_swizzled_scales=True),
    "MXFP4": MXTensor.to_mx(x, torch.float4_e2m1fn_x2, is_swizzled_scales=True),
}
for name, tensor in tensors.items():
    whole = tensor.dequantize(torch.float32)
    for what, part in (("rows", (slice(128, 256), slice(None))), ("columns", (slice(None), slice(0, 256)))):
        try:
            same = torch.equal(tensor[part].dequantize(torch.float32), whole[part])
            print(f"{name}, half the {what}: {'right' if same else 'wrong'}")
        except RuntimeError as error:
            print(f"{name}, half the {what}: RuntimeError: {error}")
PYTHON
cat > expected <<'TEXT'
NVFP4, half the rows: right
NVFP4, half the columns: right
MXFP8, half the rows: right
MXFP8, half the columns: RuntimeError: shape '[64, 32]' is invalid for input of size 4096
MXFP4, half the rows: right
MXFP4, half the columns: RuntimeError: shape '[64, 32]' is invalid for input of size 4096
TEXT
seen=$("$folder/venv/bin/python" -W ignore finding.py 2>/dev/null)
echo "$seen"
[ "$seen" = "$(cat expected)" ] || { echo "That differs from what was seen:"; cat expected; exit 1; }
