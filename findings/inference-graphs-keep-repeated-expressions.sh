#!/usr/bin/env bash
# torch 2.13.0: of a function that computes one expression twice, Inductor's post-grad graph has it once where gradients
# are asked for, since AOTAutograd's partitioner removes common subexpressions, and twice under inference_mode, where
# nobody does. So a mask that each layer's attention makes anew of one comparison is made for each layer.
#
# Exit status 0: it is so today. 1: it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip --quiet --disable-pip-version-check install torch==2.13.0 numpy
cd "$folder"
cat > finding.py <<'PYTHON'
import torch
from torch._inductor.custom_graph_pass import CustomGraphPass

counts = []


class Count(CustomGraphPass):
    def __call__(self, graph):
        counts.append(len(graph.find_nodes(op="call_function", target=torch.ops.aten.erf.default)))

    def uuid(self):
        return None


torch._inductor.config.post_grad_custom_post_pass = Count()


def twice(x, weight):
    return x.erf() @ weight + x.erf() @ weight.T


x, weight = torch.randn(4, 8), torch.randn(8, 8)
with torch.inference_mode():
    torch.compile(twice)(x, weight)
print("erf in the graph for inference:", counts.pop(0))
torch._dynamo.reset()
torch.compile(twice)(x.requires_grad_(), weight)
print("erf in the forward graph of training:", counts.pop(0))
PYTHON
cat > expected <<'TEXT'
erf in the graph for inference: 2
erf in the forward graph of training: 1
TEXT
seen=$("$folder/venv/bin/python" -W ignore finding.py 2>/dev/null)
echo "$seen"
[ "$seen" = "$(cat expected)" ] || { echo "That differs from what was seen:"; cat expected; exit 1; }
