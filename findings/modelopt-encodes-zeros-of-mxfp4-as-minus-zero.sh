#!/usr/bin/env bash
# nvidia-modelopt 0.47.0: its two tensors of E2M1 numbers encode the same values differently. NVFP4QTensor rounds ties
# to the even code, as torchao and ml_dtypes do. MXFP4QTensor rounds every tie towards zero, so 0.75 becomes 0.5 and 3.5
# becomes 3, and sets the sign of each zero: a tensor of zeros is packed as 0x88, and comes back as -0. Its import fails
# without huggingface_hub and requests, which a plain install doesn't bring.
#
# Exit status 0: it is so today. 1: it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip --quiet --disable-pip-version-check install torch==2.13.0 numpy
"$folder/venv/bin/python" -m pip --quiet --disable-pip-version-check install huggingface_hub==2.4.0 requests
"$folder/venv/bin/python" -m pip --quiet --disable-pip-version-check install nvidia-modelopt==0.47.0
cd "$folder"
cat > finding.py <<'PYTHON'
import torch
from modelopt.torch.quantization.qtensor import MXFP4QTensor, NVFP4QTensor

# A 6 in the group: both have a scale of 1.
x = torch.tensor([[6.0, 0.0, 0.75, 1.75, 3.5, -0.75, -3.5, 0.0] * 4])
mx, scale = MXFP4QTensor.quantize(x.clone(), 32)
nv, *_ = NVFP4QTensor.quantize(x.clone(), 16, torch.ones(1, 2).to(torch.float8_e4m3fn), torch.tensor(1.0))
print("numbers", x[0, :8].tolist())
print("MXFP4  ", mx.dequantize(torch.float32, scale=scale, block_sizes=[32])[0, :8].tolist())
ones = {"scale": torch.ones(1, 2), "double_scale": torch.ones(1)}
print("NVFP4  ", nv.dequantize(torch.float32, block_sizes=[16], **ones)[0, :8].tolist())
zeros, _ = MXFP4QTensor.quantize(torch.zeros(1, 32), 32)
print("bytes of zeros:", {hex(byte) for byte in zeros._quantized_data.flatten().tolist()})
PYTHON
cat > expected <<'TEXT'
numbers [6.0, 0.0, 0.75, 1.75, 3.5, -0.75, -3.5, 0.0]
MXFP4   [6.0, -0.0, 0.5, 1.5, 3.0, -0.5, -3.0, -0.0]
NVFP4   [6.0, 0.0, 1.0, 2.0, 4.0, -1.0, -4.0, 0.0]
bytes of zeros: {'0x88'}
TEXT
seen=$("$folder/venv/bin/python" -W ignore finding.py 2>/dev/null)
echo "$seen"
[ "$seen" = "$(cat expected)" ] || { echo "That differs from what was seen:"; cat expected; exit 1; }
