#!/usr/bin/env bash
# Attention of a query whose mask allows no key, as of padding, is 0 in torch 2.13.0, in ONNX's definition (1.23.2) and
# in onnxruntime 1.32.0. Converted by openvino 2026.4.1 it is NaN, which spreads through the layers behind.
# jax.nn.dot_product_attention of JAX 0.10.2 gives the mean of all values, those of masked keys among them, and 0 where
# the same row is behind query_seq_lengths. So a model moved from one to the other has other numbers in padded rows, and
# statistics over all rows, as of pooling or of a quantiser's scale, differ or are NaN. None of the three is warned of.
#
# Exit status 0: it is so today. 1: it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip --quiet --disable-pip-version-check install torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" -m pip --quiet --disable-pip-version-check install openvino==2026.4.1 packaging==26.3
"$folder/venv/bin/python" -m pip --quiet --disable-pip-version-check install onnx==1.23.2 onnxruntime==1.32.0
"$folder/venv/bin/python" -m pip --quiet --disable-pip-version-check install jax==0.10.2
cd "$folder"
cat > finding.py <<'PYTHON'
import jax
import jax.numpy as jnp
import onnxruntime
import openvino
import torch
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

onnxruntime.set_default_logger_severity(4)
q, k = torch.ones(1, 1, 2, 4), torch.ones(1, 1, 2, 4)
v = torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]])[None, None]
mask = torch.tensor([[True, False], [False, False]])


class Attention(torch.nn.Module):
    def forward(self, q, k, v):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, mask)


exported = torch.export.export(Attention(), (q, k, v))
converted = openvino.compile_model(openvino.convert_model(exported), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, (1, 1, 2, 4)) for name in "qkv"]
inputs.append(helper.make_tensor_value_info("mask", TensorProto.BOOL, (2, 2)))
node = helper.make_node("Attention", ["q", "k", "v", "mask"], ["y"])
output = helper.make_tensor_value_info("y", TensorProto.FLOAT, (1, 1, 2, 4))
graph = helper.make_graph([node], "attention", inputs, [output])
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
given = {"q": q.numpy(), "k": k.numpy(), "v": v.numpy(), "mask": mask.numpy()}
jax_q, jax_k, jax_v = (jnp.asarray(tensor.transpose(1, 2).numpy()) for tensor in (q, k, v))
by_mask = jax.nn.dot_product_attention(jax_q, jax_k, jax_v, mask=jnp.asarray(mask.numpy())[None, None])
lengths = jnp.array([1])
by_length = jax.nn.dot_product_attention(jax_q, jax_k, jax_v, query_seq_lengths=lengths, key_value_seq_lengths=lengths)
results = {
    "torch": Attention()(q, k, v).numpy(),
    "ONNX": ReferenceEvaluator(model).run(None, given)[0],
    "onnxruntime": session.run(None, given)[0],
    "openvino": converted([q.numpy(), k.numpy(), v.numpy()])[0],
    "JAX, mask": by_mask,
    "JAX, lengths": by_length,
}
for name, result in results.items():
    rows = result.reshape(2, 4).tolist()
    print(f"{name}: one key {rows[0]}, none {rows[1]}")
PYTHON
cat > expected <<'TEXT'
torch: one key [1.0, 2.0, 3.0, 4.0], none [0.0, 0.0, 0.0, 0.0]
ONNX: one key [1.0, 2.0, 3.0, 4.0], none [0.0, 0.0, 0.0, 0.0]
onnxruntime: one key [1.0, 2.0, 3.0, 4.0], none [0.0, 0.0, 0.0, 0.0]
openvino: one key [1.0, 2.0, 3.0, 4.0], none [nan, nan, nan, nan]
JAX, mask: one key [1.0, 2.0, 3.0, 4.0], none [3.0, 4.0, 5.0, 6.0]
JAX, lengths: one key [1.0, 2.0, 3.0, 4.0], none [0.0, 0.0, 0.0, 0.0]
TEXT
seen=$("$folder/venv/bin/python" -W ignore finding.py 2>/dev/null)
echo "$seen"
[ "$seen" = "$(cat expected)" ] || { echo "That differs from what was seen:"; cat expected; exit 1; }
