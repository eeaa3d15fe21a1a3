#!/usr/bin/env bash
# torchao 0.18.0: a linear layer whose activations are quantised to int8 as they come raises a TypeError about a Tensor
# and None where its input has no rows, as that of an expert which no token was sent to. Unquantised, and with weights
# alone quantised, the result is empty.
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
from torchao.quantization import (
    Int8DynamicActivationInt8WeightConfig,
    Int8DynamicActivationIntxWeightConfig,
    Int8WeightOnlyConfig,
    quantize_,
)

configs = (
    None,
    Int8WeightOnlyConfig(),
    Int8DynamicActivationInt8WeightConfig(),
    Int8DynamicActivationIntxWeightConfig(),
)
for config in configs:
    model = torch.nn.Sequential(torch.nn.Linear(256, 256))
    if config is not None:
        quantize_(model, config)
    for rows in (1, 0):
        try:
            found = list(model(torch.randn(rows, 256)).shape)
        except TypeError as error:
            found = f"TypeError: {error}"
        print(type(config).__name__, rows, "rows:", found)
PYTHON
cat > expected <<'TEXT'
NoneType 1 rows: [1, 256]
NoneType 0 rows: [0, 256]
Int8WeightOnlyConfig 1 rows: [1, 256]
Int8WeightOnlyConfig 0 rows: [0, 256]
Int8DynamicActivationInt8WeightConfig 1 rows: [1, 256]
Int8DynamicActivationInt8WeightConfig 0 rows: TypeError: unsupported operand type(s) for +: 'Tensor' and 'NoneType'
Int8DynamicActivationIntxWeightConfig 1 rows: [1, 256]
Int8DynamicActivationIntxWeightConfig 0 rows: TypeError: unsupported operand type(s) for +: 'Tensor' and 'NoneType'
TEXT
seen=$("$folder/venv/bin/python" -W ignore finding.py 2>/dev/null)
echo "$seen"
[ "$seen" = "$(cat expected)" ] || { echo "That differs from what was seen:"; cat expected; exit 1; }
