#!/usr/bin/env bash
# onnxruntime 1.32.0: its optimiser makes one quantisation of two that follow each other, QuantizeLinear,
# DequantizeLinear, and both again with another scale or zero point. The one has the range that both ranges share, and
# a scale of its own: that range in 255 steps. So the numbers of the result lie on neither of the grids: 0.5 comes
# back as 0.49, and 2.5, which a scale of 1 makes 2, stays 2.5. The model as written, with the optimiser off, and
# onnx's reference round as the model says.
#
# Exit status 0: it is so today. 1: it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip --quiet --disable-pip-version-check install onnx==1.23.2 numpy==2.4.6
"$folder/venv/bin/python" -m pip --quiet --disable-pip-version-check install onnxruntime==1.32.0
cd "$folder"
cat > finding.py <<'PYTHON'
import numpy as np
import onnxruntime
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

onnxruntime.set_default_logger_severity(4)
x = np.array([0.5, 2.5, -1.5, 30.0], np.float32)
node = helper.make_node


def model(first, second):
    nodes = [node("QuantizeLinear", ["x", "s1", "z1"], ["q1"]), node("DequantizeLinear", ["q1", "s1", "z1"], ["d"]),
             node("QuantizeLinear", ["d", "s2", "z2"], ["q2"]), node("DequantizeLinear", ["q2", "s2", "z2"], ["y"])]
    given = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [4]) for name in "xy"]
    constants = []
    for at, (scale, zero) in ((1, first), (2, second)):
        constants.append(helper.make_tensor(f"s{at}", TensorProto.FLOAT, (), [scale]))
        constants.append(helper.make_tensor(f"z{at}", TensorProto.INT8, (), [zero]))
    graph = helper.make_graph(nodes, "twice", given[:1], given[1:], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def run(made, level):
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = level
    session = onnxruntime.InferenceSession(made.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return [round(number, 4) for number in session.run(None, {"x": x})[0].tolist()]


level = onnxruntime.GraphOptimizationLevel
for first, second in (((0.5, 0), (0.5, 0)), ((0.5, 5), (0.5, 0)), ((0.5, 0), (1.0, 0))):
    made = model(first, second)
    (reference,) = ReferenceEvaluator(made).run(None, {"x": x})
    print(f"(scale, zero point) {first} and {second}: optimised {run(made, level.ORT_ENABLE_ALL)},")
    print(f"    as written {run(made, level.ORT_DISABLE_ALL)}, reference {reference.tolist()}")
PYTHON
cat > expected <<'TEXT'
(scale, zero point) (0.5, 0) and (0.5, 0): optimised [0.5, 2.5, -1.5, 30.0],
    as written [0.5, 2.5, -1.5, 30.0], reference [0.5, 2.5, -1.5, 30.0]
(scale, zero point) (0.5, 5) and (0.5, 0): optimised [0.4902, 2.451, -1.4706, 29.902],
    as written [0.5, 2.5, -1.5, 30.0], reference [0.5, 2.5, -1.5, 30.0]
(scale, zero point) (0.5, 0) and (1.0, 0): optimised [0.5, 2.5, -1.5, 30.0],
    as written [0.0, 2.0, -2.0, 30.0], reference [0.0, 2.0, -2.0, 30.0]
TEXT
seen=$("$folder/venv/bin/python" -W ignore finding.py 2>/dev/null)
echo "$seen"
[ "$seen" = "$(cat expected)" ] || { echo "That differs from what was seen:"; cat expected; exit 1; }
