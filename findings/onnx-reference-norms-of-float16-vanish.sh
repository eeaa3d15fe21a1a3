#!/usr/bin/env bash
# onnx 1.23.2: the reference evaluator, which runtimes are tested against, computes RMSNormalization and
# LayerNormalization of float16 in float16. Their attribute stash_type, float32 by default, is the precision of the
# first stage. So the squares of activations of 300 are infinite, and the normalised row is zeros; of small ones, with
# an epsilon that float16 doesn't have, it is infinite. onnxruntime 1.32.0 gives ones for both. The reference's
# LogSoftmax is the logarithm of its Softmax, in float32 too: minus infinity where onnxruntime gives -200.
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


def run(name, x, **attributes):
    kind = helper.np_dtype_to_tensor_dtype(x.dtype)
    names = ["x"] if name == "LogSoftmax" else ["x", "w"]
    weight = helper.make_tensor("w", kind, [4], np.ones(4, x.dtype))
    made = helper.make_model(
        helper.make_graph([helper.make_node(name, names, ["y"], **attributes)], "norm",
                          [helper.make_tensor_value_info("x", kind, [4])],
                          [helper.make_tensor_value_info("y", kind, [4])], [weight]),
        opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
    session = onnxruntime.InferenceSession(made.SerializeToString(), providers=["CPUExecutionProvider"])
    with np.errstate(all="ignore"):
        (reference,) = ReferenceEvaluator(made).run(None, {"x": x})
    (here,) = session.run(None, {"x": x})
    return f"reference {np.round(reference, 3).tolist()}, onnxruntime {np.round(here, 3).tolist()}"


signs = np.array([1, -1, 1, -1], np.float16)
for size in (100, 300):
    for name in ("RMSNormalization", "LayerNormalization"):
        print(f"{name} of {size}:", run(name, signs * np.float16(size)))
print("RMSNormalization of 1e-4:", run("RMSNormalization", signs * np.float16(1e-4), epsilon=1e-12))
print("LogSoftmax of float32:", run("LogSoftmax", np.array([200, 0, 0, 0], np.float32)))
PYTHON
cat > expected <<'TEXT'
RMSNormalization of 100: reference [1.0, -1.0, 1.0, -1.0], onnxruntime [1.0, -1.0, 1.0, -1.0]
LayerNormalization of 100: reference [1.0, -1.0, 1.0, -1.0], onnxruntime [1.0, -1.0, 1.0, -1.0]
RMSNormalization of 300: reference [0.0, -0.0, 0.0, -0.0], onnxruntime [1.0, -1.0, 1.0, -1.0]
LayerNormalization of 300: reference [0.0, -0.0, 0.0, -0.0], onnxruntime [1.0, -1.0, 1.0, -1.0]
RMSNormalization of 1e-4: reference [inf, -inf, inf, -inf], onnxruntime [1.0, -1.0, 1.0, -1.0]
LogSoftmax of float32: reference [0.0, -inf, -inf, -inf], onnxruntime [0.0, -200.0, -200.0, -200.0]
TEXT
seen=$("$folder/venv/bin/python" -W ignore finding.py 2>/dev/null)
echo "$seen"
[ "$seen" = "$(cat expected)" ] || { echo "That differs from what was seen:"; cat expected; exit 1; }
