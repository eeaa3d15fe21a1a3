#!/usr/bin/env bash
# onnxscript 0.7.2: its optimiser, which torch.onnx.export runs by default, makes one Clip of a Clip and a Relu, and
# of two Clips, with the larger of the lower bounds and the smaller of the upper ones. Where the two ranges don't
# meet, the upper bound is under the lower one, and the result is the first operator's: Relu of a Clip to -3 and -1 is
# -1, not 0, and a Clip to 0.75 and 2 after one to -1 and 0.5 gives 0.5. Ranges that meet are right, and so is the
# model before.
#
# Exit status 0: it is so today. 1: it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip --quiet --disable-pip-version-check install onnx==1.23.2 numpy==2.4.6
"$folder/venv/bin/python" -m pip --quiet --disable-pip-version-check install onnxscript==0.7.2
cd "$folder"
cat > finding.py <<'PYTHON'
import logging

import numpy as np
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator
from onnxscript import optimizer

logging.disable(logging.CRITICAL)
x = np.array([-5.0, -2.0, 0.25, 5.0], np.float32)


def model(*steps):
    nodes, constants, last = [], [], "x"
    for at, bounds in enumerate(steps):
        names = [last]
        for name, bound in zip("lh", bounds):
            names.append(f"{name}{at}")
            constants.append(helper.make_tensor(names[-1], TensorProto.FLOAT, (), [bound]))
        last = f"y{at}"
        nodes.append(helper.make_node("Clip" if bounds else "Relu", names, [last]))
    given = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [4]) for name in ("x", last)]
    graph = helper.make_graph(nodes, "clips", given[:1], given[1:], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


for steps in (((-1, 0.5), ()), ((-3, -1), ()), ((-1, 0.5), (0, 2)), ((-1, 0.5), (0.75, 2))):
    made = model(*steps)
    optimised = optimizer.optimize(made)
    found = [ReferenceEvaluator(each).run(None, {"x": x})[0].tolist() for each in (made, optimised)]
    names = ", ".join(f"Clip to {bounds}" if bounds else "Relu" for bounds in steps)
    kinds = [node.op_type for node in optimised.graph.node]
    print(f"{names}: {found[0]}, optimised {found[1]}, by {kinds}")
PYTHON
cat > expected <<'TEXT'
Clip to (-1, 0.5), Relu: [0.0, 0.0, 0.25, 0.5], optimised [0.0, 0.0, 0.25, 0.5], by ['Clip']
Clip to (-3, -1), Relu: [0.0, 0.0, 0.0, 0.0], optimised [-1.0, -1.0, -1.0, -1.0], by ['Clip']
Clip to (-1, 0.5), Clip to (0, 2): [0.0, 0.0, 0.25, 0.5], optimised [0.0, 0.0, 0.25, 0.5], by ['Clip']
Clip to (-1, 0.5), Clip to (0.75, 2): [0.75, 0.75, 0.75, 0.75], optimised [0.5, 0.5, 0.5, 0.5], by ['Clip']
TEXT
seen=$("$folder/venv/bin/python" -W ignore finding.py 2>/dev/null)
echo "$seen"
[ "$seen" = "$(cat expected)" ] || { echo "That differs from what was seen:"; cat expected; exit 1; }
