#!/usr/bin/env bash
# onnxruntime 1.32.0, CPU: ReduceMax and ReduceMin of numbers of which one is NaN give NaN where it is the first, and
# else the largest or smallest of some of the others: of 1, NaN, 3 and 4 the maximum is 3. ArgMax gives the NaN's
# place, or the largest number's, likewise. onnx's reference and torch give NaN and its place wherever it is, and so
# do onnxruntime's own Max and TopK. DynamicQuantizeLinear passes it over: it makes the NaN a number, 0, and the
# others stay what they are. So a broken layer is found, or not, by where in a row it breaks.
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


def run(name, x, kinds=(TensorProto.FLOAT,), **attributes):
    outputs = [helper.make_tensor_value_info(f"y{at}", kind, None) for at, kind in enumerate(kinds)]
    given = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, None])]
    node = helper.make_node(name, ["x"], [output.name for output in outputs], **attributes)
    made = helper.make_model(helper.make_graph([node], "maximum", given, outputs),
                             opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    session = onnxruntime.InferenceSession(made.SerializeToString(), providers=["CPUExecutionProvider"])
    return [{"here": session.run(None, {"x": x}), "reference": ReferenceEvaluator(made).run(None, {"x": x})}[who][0]
            .flatten().tolist() for who in ("here", "reference")]


for at in range(4):
    x = np.array([[1.0, 2.0, 3.0, 4.0]], np.float32)
    x[0, at] = np.nan
    found = [f"{name} {run(name, x)[0]} and {run(name, x)[1]}" for name in ("ReduceMax", "ReduceMin")]
    found.append("ArgMax {} and {}".format(*run("ArgMax", x, (TensorProto.INT64,), axis=1)))
    print(f"NaN at {at}:", ", ".join(found))
kinds = (TensorProto.UINT8, TensorProto.FLOAT, TensorProto.UINT8)
x = np.array([[np.nan, 1.0, 2.0]], np.float32)
print("DynamicQuantizeLinear of [nan, 1, 2]:", run("DynamicQuantizeLinear", x, kinds)[0])
PYTHON
cat > expected <<'TEXT'
NaN at 0: ReduceMax [nan] and [nan], ReduceMin [nan] and [nan], ArgMax [0] and [0]
NaN at 1: ReduceMax [3.0] and [nan], ReduceMin [1.0] and [nan], ArgMax [3] and [1]
NaN at 2: ReduceMax [4.0] and [nan], ReduceMin [1.0] and [nan], ArgMax [3] and [2]
NaN at 3: ReduceMax [3.0] and [nan], ReduceMin [1.0] and [nan], ArgMax [2] and [3]
DynamicQuantizeLinear of [nan, 1, 2]: [0, 127, 255]
TEXT
seen=$("$folder/venv/bin/python" -W ignore finding.py 2>/dev/null)
echo "$seen"
[ "$seen" = "$(cat expected)" ] || { echo "That differs from what was seen:"; cat expected; exit 1; }
