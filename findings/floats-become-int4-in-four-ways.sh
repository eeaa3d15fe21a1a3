#!/usr/bin/env bash
# Casts of floats to int4, as quantisers write after dividing by a scale: ml_dtypes 0.6.0 and onnx 1.23.2's reference
# drop the fraction and keep the low four bits, so 8 becomes -8. JAX 0.10.2 drops it too and stops at 7 and -8, also
# where it is given the numbers that NumPy has. onnxruntime 1.32.0 rounds halves away from 0 and keeps the low bits,
# so that 7.5 is -8. Its casts to int8 drop the fraction. ONNX leaves what is out of range open. Where a clamp is
# missing, or stands before the rounding, weights of one checkpoint differ by who casts.
#
# Exit status 0: it is so today. 1: it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip --quiet --disable-pip-version-check install onnx==1.23.2 numpy==2.4.6
"$folder/venv/bin/python" -m pip --quiet --disable-pip-version-check install onnxruntime==1.32.0 ml_dtypes==0.6.0
"$folder/venv/bin/python" -m pip --quiet --disable-pip-version-check install jax==0.10.2
cd "$folder"
cat > finding.py <<'PYTHON'
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import onnxruntime
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

onnxruntime.set_default_logger_severity(4)
x = np.array([0.5, 1.5, 2.7, -1.5, 7.0, 7.5, 8.0, 12.0, -9.0], np.float32)


def model(kind):
    nodes = [helper.make_node("Cast", ["x"], ["q"], to=kind)]
    nodes.append(helper.make_node("Cast", ["q"], ["y"], to=TensorProto.FLOAT))
    given = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [9]) for name in "xy"]
    return helper.make_model(helper.make_graph(nodes, "cast", given[:1], given[1:]),
                             opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def numbers(found):
    return np.asarray(found).astype(np.int64).tolist()


for kind in ("INT4", "INT8"):
    made = model(getattr(TensorProto, kind))
    session = onnxruntime.InferenceSession(made.SerializeToString(), providers=["CPUExecutionProvider"])
    print(f"{kind}, onnxruntime:", numbers(session.run(None, {"x": x})[0]))
    print(f"{kind}, onnx:       ", numbers(ReferenceEvaluator(made).run(None, {"x": x})[0]))
print("INT4, ml_dtypes:  ", numbers(x.astype(ml_dtypes.int4)))
print("INT4, JAX:        ", numbers(jnp.asarray(x).astype(jnp.int4)))
PYTHON
cat > expected <<'TEXT'
INT4, onnxruntime: [1, 2, 3, -2, 7, -8, -8, -4, 7]
INT4, onnx:        [0, 1, 2, -1, 7, 7, -8, -4, 7]
INT8, onnxruntime: [0, 1, 2, -1, 7, 7, 8, 12, -9]
INT8, onnx:        [0, 1, 2, -1, 7, 7, 8, 12, -9]
INT4, ml_dtypes:   [0, 1, 2, -1, 7, 7, -8, -4, 7]
INT4, JAX:         [0, 1, 2, -1, 7, 7, 7, 7, -8]
TEXT
seen=$("$folder/venv/bin/python" -W ignore finding.py 2>/dev/null)
echo "$seen"
[ "$seen" = "$(cat expected)" ] || { echo "That differs from what was seen:"; cat expected; exit 1; }
