#!/usr/bin/env bash
# torchao 0.18.0: to(torch.bfloat16) of an MXTensor is silently ignored: the tensor keeps float32, and so does what
# dequantize() returns. An NVFP4Tensor takes the dtype. After a quantised model is moved by model.to(torch.bfloat16), a
# Float8Tensor of float32 is still one too, and the layer fails on inputs of bfloat16.
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
from torchao.quantization import Float8WeightOnlyConfig, quantize_

x = torch.randn(256, 256)
tensors = {
    "MXFP8": MXTensor.to_mx(x, torch.float8_e4m3fn),
    "MXFP4": MXTensor.to_mx(x, torch.float4_e2m1fn_x2),
    "NVFP4": NVFP4Tensor.to_nvfp4(x),
}
for name, tensor in tensors.items():
    moved = tensor.to(torch.bfloat16)
    print(f"{name}.to(bfloat16): {moved.dtype}, dequantized: {moved.dequantize().dtype}")

model = torch.nn.Sequential(torch.nn.Linear(256, 256))
quantize_(model, Float8WeightOnlyConfig())
model.to(torch.bfloat16)
print("model.to(bfloat16): weight", model[0].weight.dtype, "bias", model[0].bias.dtype)
try:
    model(x.bfloat16())
except RuntimeError as error:
    print("RuntimeError:", str(error).splitlines()[0])
PYTHON
cat > expected <<'TEXT'
MXFP8.to(bfloat16): torch.float32, dequantized: torch.float32
MXFP4.to(bfloat16): torch.float32, dequantized: torch.float32
NVFP4.to(bfloat16): torch.bfloat16, dequantized: torch.bfloat16
model.to(bfloat16): weight torch.float32 bias torch.bfloat16
RuntimeError: expected m1 and m2 to have the same dtype, but got: c10::BFloat16 != float
TEXT
seen=$("$folder/venv/bin/python" -W ignore finding.py 2>/dev/null)
echo "$seen"
[ "$seen" = "$(cat expected)" ] || { echo "That differs from what was seen:"; cat expected; exit 1; }
