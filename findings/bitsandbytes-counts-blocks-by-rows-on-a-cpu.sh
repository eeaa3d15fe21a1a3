#!/usr/bin/env bash
# bitsandbytes 0.50.2, CPU: quantize_4bit counts its blocks through the whole tensor, whatever its shape, and
# dequantize_4bit starts them anew in each row, with scales that belong to others. Where rows aren't whole blocks, as
# 96 columns by the default of 64, and rows differ in size, weights come back wrong by 70 % instead of 9 %, and so
# does what a layer (Linear4bit) computes of them, without a word. The same numbers as one row are right.
#
# Exit status 0: it is so today. 1: it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip --quiet --disable-pip-version-check install torch==2.13.0 numpy
"$folder/venv/bin/python" -m pip --quiet --disable-pip-version-check install bitsandbytes==0.50.2 packaging
cd "$folder"
cat > finding.py <<'PYTHON'
import bitsandbytes
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit

torch.manual_seed(0)
for columns in (64, 96, 128):
    weight = torch.randn(32, columns) * torch.rand(32, 1)
    back = dequantize_4bit(*quantize_4bit(weight, quant_type="nf4"))
    row = dequantize_4bit(*quantize_4bit(weight.flatten(), quant_type="nf4")).view(weight.shape)
    layer = bitsandbytes.nn.Linear4bit(columns, 32, bias=False, quant_type="nf4", compute_dtype=torch.float32)
    layer.load_state_dict({"weight": weight})
    by_layer = layer.to("cpu")(torch.eye(columns)).T
    errors = [((found - weight).norm() / weight.norm()).item() for found in (back, row, by_layer)]
    print(f"{columns} columns: off by {errors[0]:.0%}, as one row by {errors[1]:.0%}, in a layer by {errors[2]:.0%}")
PYTHON
cat > expected <<'TEXT'
64 columns: off by 9%, as one row by 9%, in a layer by 9%
96 columns: off by 70%, as one row by 10%, in a layer by 70%
128 columns: off by 9%, as one row by 9%, in a layer by 9%
TEXT
seen=$("$folder/venv/bin/python" -W ignore finding.py 2>/dev/null)
echo "$seen"
[ "$seen" = "$(cat expected)" ] || { echo "That differs from what was seen:"; cat expected; exit 1; }
