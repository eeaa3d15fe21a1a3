#!/usr/bin/env bash
# compressed-tensors 0.20.1 with torch 2.13.0: the forward of a quantised linear layer puts the quantised weight in the
# place of the layer's own by a context manager that calls object(), which Dynamo doesn't trace. With fullgraph=True
# torch.compile raises; without, three quantised layers in a row are compiled to graphs that hold no product at all: all
# that is left of the model runs eagerly, and silently so.
#
# Exit status 0: it is so today. 1: it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip --quiet --disable-pip-version-check install torch==2.13.0 numpy
"$folder/venv/bin/python" -m pip --quiet --disable-pip-version-check install compressed-tensors==0.20.1
cd "$folder"
cat > finding.py <<'PYTHON'
import logging

import torch

logging.disable(logging.CRITICAL)
from compressed_tensors.quantization import (
    QuantizationConfig,
    QuantizationStatus,
    apply_quantization_config,
    preset_name_to_scheme,
)

torch.manual_seed(0)
model = torch.nn.Sequential(*(torch.nn.Linear(32, 32, bias=False) for _ in range(3))).bfloat16().eval()
config = QuantizationConfig(config_groups={"all": preset_name_to_scheme("FP8_DYNAMIC", targets=["Linear"])})
apply_quantization_config(model, config)
for layer in model:
    layer.quantization_status = QuantizationStatus.FROZEN

graphs = []


def keep(gm, inputs):
    graphs.append(gm)
    return gm.forward


x = torch.randn(1, 4, 32).bfloat16()
with torch.inference_mode():
    torch.compile(model, backend=keep)(x)
    products = [node for gm in graphs for node in gm.graph.nodes if node.target is torch._C._nn.linear]
    print("products in the graphs of three layers:", len(products))
    torch._dynamo.reset()
    try:
        torch.compile(model, backend="eager", fullgraph=True)(x)
    except Exception as error:
        print("fullgraph:", type(error).__name__, "builtin operator `object`" in str(error))
PYTHON
cat > expected <<'TEXT'
products in the graphs of three layers: 0
fullgraph: Unsupported True
TEXT
seen=$("$folder/venv/bin/python" -W ignore finding.py 2>/dev/null)
echo "$seen"
[ "$seen" = "$(cat expected)" ] || { echo "That differs from what was seen:"; cat expected; exit 1; }
