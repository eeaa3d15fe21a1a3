#!/usr/bin/env bash
# torchao 0.18.0, comfy-kitchen 0.2.40 and gguf 0.19.0 pack two numbers of E2M1 into a byte, all with names like MXFP4
# and NVFP4, each in another order: torchao has the first number of a pair in the low half, comfy-kitchen in the high
# half unless it is told hi_first=False, and gguf has the first half of a block in the low halves and the second half of
# it in the high ones. All three are uint8 of the same shape for a block, so the bytes of one are read by another
# without an error, in another order.
#
# Exit status 0: it is so today. 1: it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip --quiet --disable-pip-version-check install torch==2.13.0 numpy
"$folder/venv/bin/python" -m pip --quiet --disable-pip-version-check install torchao==0.18.0 gguf==0.19.0 packaging
"$folder/venv/bin/python" -m pip --quiet --disable-pip-version-check install --no-deps comfy-kitchen==0.2.40
cd "$folder"
cat > finding.py <<'PYTHON'
import gguf
import torch
from comfy_kitchen.backends.eager.quantization import quantize_nvfp4
from torchao.prototype.mx_formats.mx_tensor import to_mx

# A block of 32 whose scale is 1 everywhere: the codes of its numbers are 7, 1, 2, 3, 4, 5, 6, 0, and so on.
x = torch.tensor([[6.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 0.0] * 4])
_, torchao = to_mx(x, torch.float4_e2m1fn_x2, 32)
comfy, _ = quantize_nvfp4(x.repeat(16, 1), torch.tensor(1.0))
ggml = torch.from_numpy(gguf.quants.quantize(x.numpy(), gguf.GGMLQuantizationType.MXFP4))[:, 1:]
for name, found in (("torchao", torchao), ("comfy-kitchen", comfy), ("gguf", ggml)):
    print(f"{name:13}", *(f"{byte:02x}" for byte in found.view(torch.uint8)[0, :8].tolist()))
PYTHON
cat > expected <<'TEXT'
torchao       17 32 54 06 17 32 54 06
comfy-kitchen 71 23 45 60 71 23 45 60
gguf          77 11 22 33 44 55 66 00
TEXT
seen=$("$folder/venv/bin/python" -W ignore finding.py 2>/dev/null)
echo "$seen"
[ "$seen" = "$(cat expected)" ] || { echo "That differs from what was seen:"; cat expected; exit 1; }
