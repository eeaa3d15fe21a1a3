#!/usr/bin/env bash
# torch 2.13.0 with onnxscript 0.7.2: torch.onnx.export leaves arguments out that ONNX's operators don't have, and
# says nothing. cross_entropy exports without its label_smoothing, avg_pool2d without its divisor_override, and
# scatter_reduce by "mean" becomes ScatterElements without a reduction, so that the last number stays. The model is
# valid, runs, and gives other numbers. What the exporter has no operator for, index_reduce for one, raises an error.
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


index = torch.tensor([1, 1, 2])
cases = {
    "cross_entropy, label_smoothing=0.5": (
        lambda x: F.cross_entropy(x, torch.tensor([0]), label_smoothing=0.5), torch.tensor([[2.0, 0.0, 0.0]])),
    "avg_pool2d, divisor_override=2": (lambda x: F.avg_pool2d(x, 2, divisor_override=2), torch.ones(1, 1, 2, 2)),
    'scatter_reduce, "mean"': (
        lambda x: torch.zeros(3).scatter_reduce(0, index, x, "mean", include_self=False),
        torch.tensor([2.0, 4.0, 6.0])),
}
for name, (function, x) in cases.items():
    found, operators = exported(function, x)
    rounded = [[round(number, 4) for number in numbers.flatten().tolist()] for numbers in (function(x), found)]
    print(f"{name}: {rounded[0]} in eager mode, {rounded[1]} exported, by {operators[-1]}")
try:
    exported(lambda x: torch.zeros(3).index_reduce(0, index, x, "mean"), torch.ones(3))
except torch.onnx.OnnxExporterError as error:
    print("index_reduce:", type(error).__name__)
PYTHON
cat > expected <<'TEXT'
cross_entropy, label_smoothing=0.5: [0.9062] in eager mode, [0.2395] exported, by SoftmaxCrossEntropyLoss
avg_pool2d, divisor_override=2: [2.0] in eager mode, [1.0] exported, by AveragePool
scatter_reduce, "mean": [0.0, 3.0, 6.0] in eager mode, [0.0, 4.0, 6.0] exported, by ScatterElements
index_reduce: ConversionError
TEXT
seen=$("$folder/venv/bin/python" -W ignore finding.py 2>/dev/null)
echo "$seen"
[ "$seen" = "$(cat expected)" ] || { echo "That differs from what was seen:"; cat expected; exit 1; }
