#!/usr/bin/env bash
# torch 2.13.0 with onnxscript 0.7.2: torch casts infinity and what is too large to infinity in float8_e5m2, and to
# NaN in the fnuz types. torch.onnx.export writes Cast with its default, saturate=1, which makes the largest number of
# them: 57344 and 240. onnxruntime 1.32.0 runs it so. So an exported model with fp8 activations or KV caches stays
# finite where the model overflows, and tests of the one say nothing about the other. e4m3fn saturates in both. A cast
# to float8_e8m0fnu isn't exported at all.
#
# Exit status 0: it is so today. 1: it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip --quiet --disable-pip-version-check install torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" -m pip --quiet --disable-pip-version-check install onnx==1.23.2 onnxscript==0.7.2
"$folder/venv/bin/python" -m pip --quiet --disable-pip-version-check install onnxruntime==1.32.0
cd "$folder"
cat > finding.py <<'PYTHON'
import logging
import warnings

import onnxruntime
import torch
import torch.nn.functional as F

logging.disable(logging.CRITICAL)
warnings.simplefilter("ignore")


class Model(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *inputs):
        return self.function(*inputs)


def exported(function, *inputs):
    program = torch.onnx.export(Model(function), inputs, dynamo=True, verbose=False)
    content = program.model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]
    found = session.run(None, {name: x.numpy() for name, x in zip(names, inputs)})[0]
    return torch.from_numpy(found), [node.op_type for node in program.model.graph]


x = torch.tensor([1.0, 1e5, -torch.inf])
for dtype in (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz):
    found, _ = exported(lambda x: x.to(dtype).float(), x)
    print(f"{dtype}: {x.to(dtype).float().tolist()} in eager mode, {found.tolist()} exported")
try:
    exported(lambda x: x.to(torch.float8_e8m0fnu).float(), x)
except torch.onnx.OnnxExporterError as error:
    print("torch.float8_e8m0fnu:", type(error).__name__)
PYTHON
cat > expected <<'TEXT'
torch.float8_e4m3fn: [1.0, 448.0, -448.0] in eager mode, [1.0, 448.0, -448.0] exported
torch.float8_e5m2: [1.0, inf, -inf] in eager mode, [1.0, 57344.0, -57344.0] exported
torch.float8_e4m3fnuz: [1.0, nan, nan] in eager mode, [1.0, 240.0, -240.0] exported
torch.float8_e5m2fnuz: [1.0, nan, nan] in eager mode, [1.0, 57344.0, -57344.0] exported
torch.float8_e8m0fnu: ConversionError
TEXT
seen=$("$folder/venv/bin/python" -W ignore finding.py 2>/dev/null)
echo "$seen"
[ "$seen" = "$(cat expected)" ] || { echo "That differs from what was seen:"; cat expected; exit 1; }
