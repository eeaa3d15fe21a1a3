#!/usr/bin/env bash
# torch 2.13.0 with onnxscript 0.7.2: torch.onnx.export of x.clamp(0, 0.5), of float32, raises a ConversionError,
# which lists the overloads of aten.clamp and says that none takes a FakeTensor and a float. A bound that is an
# integer is made a tensor where the other is a float. clamp(0.0, 0.5) and clamp(0, 1) are exported, and so is
# clamp(0, 0.5) of float16; eager mode and torch.compile take all of them.
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


cases = {
    "clamp(0, 0.5)": lambda x: x.clamp(0, 0.5),
    "clamp(-1, 1.0)": lambda x: x.clamp(-1, 1.0),
    "clamp(0.0, 0.5)": lambda x: x.clamp(0.0, 0.5),
    "clamp(0, 1)": lambda x: x.clamp(0, 1),
}
for dtype in (torch.float32, torch.float16):
    x = torch.tensor([-5.0, 0.25, 5.0], dtype=dtype)
    for name, function in cases.items():
        try:
            found = exported(function, x)[0].tolist()
        except torch.onnx.OnnxExporterError as error:
            found = f"{type(error).__name__}, {'FakeTensor' if 'FakeTensor' in str(error) else 'something else'}"
        compiled = torch.compile(function, backend="eager")(x).tolist()
        print(f"{name} of {dtype}: eager {function(x).tolist()}, compiled {compiled}, exported {found}")
PYTHON
cat > expected <<'TEXT'
clamp(0, 0.5) of torch.float32: eager [0.0, 0.25, 0.5], compiled [0.0, 0.25, 0.5], exported ConversionError, FakeTensor
clamp(-1, 1.0) of torch.float32: eager [-1.0, 0.25, 1.0], compiled [-1.0, 0.25, 1.0], exported ConversionError, FakeTensor
clamp(0.0, 0.5) of torch.float32: eager [0.0, 0.25, 0.5], compiled [0.0, 0.25, 0.5], exported [0.0, 0.25, 0.5]
clamp(0, 1) of torch.float32: eager [0.0, 0.25, 1.0], compiled [0.0, 0.25, 1.0], exported [0.0, 0.25, 1.0]
clamp(0, 0.5) of torch.float16: eager [0.0, 0.25, 0.5], compiled [0.0, 0.25, 0.5], exported [0.0, 0.25, 0.5]
clamp(-1, 1.0) of torch.float16: eager [-1.0, 0.25, 1.0], compiled [-1.0, 0.25, 1.0], exported [-1.0, 0.25, 1.0]
clamp(0.0, 0.5) of torch.float16: eager [0.0, 0.25, 0.5], compiled [0.0, 0.25, 0.5], exported [0.0, 0.25, 0.5]
clamp(0, 1) of torch.float16: eager [0.0, 0.25, 1.0], compiled [0.0, 0.25, 1.0], exported [0.0, 0.25, 1.0]
TEXT
seen=$("$folder/venv/bin/python" -W ignore finding.py 2>/dev/null)
echo "$seen"
[ "$seen" = "$(cat expected)" ] || { echo "That differs from what was seen:"; cat expected; exit 1; }
