#!/usr/bin/env bash
# torch 2.12.0 (2.11.0 likewise; 2.13.0 no more): where Inductor meets a custom op for the first time, it makes the text of
# a log line, whether or not anybody reads it: all that the call depends on, written out once for every way to it. Where
# each layer's op yields two results and the next one reads both, as a residual stream and its norm, that text gets 2.2
# times as long with every layer: some 33, 162 and 750 thousand characters behind 4, 6 and 8 layers, for an op that comes
# behind the last one. Models of many layers take as much longer to compile.
#
# Exit status 0: it is so today. 1: it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip --quiet --disable-pip-version-check install torch==2.12.0 numpy
cd "$folder"
cat > finding.py <<'PYTHON'
import torch
from torch._inductor import exc

library = torch.library.Library("finding", "DEF")
library.define("layer(Tensor x, Tensor rest) -> (Tensor, Tensor)")
library.define("last(Tensor x) -> Tensor")
library.impl("layer", lambda x, rest: (x + rest, x - rest), "CompositeExplicitAutograd")
library.impl("last", lambda x: x + 1, "CompositeExplicitAutograd")
torch.library.register_fake("finding::layer", lambda x, rest: (torch.empty_like(x), torch.empty_like(x)), lib=library)
torch.library.register_fake("finding::last", lambda x: torch.empty_like(x), lib=library)

written = {}
original = exc.OperatorIssue.operator_str


def counted(target, args, kwargs):
    text = original(target, args, kwargs)
    written[str(target)] = len(text)
    return text


exc.OperatorIssue.operator_str = staticmethod(counted)


def characters(layers):
    def model(x, rest):
        for _ in range(layers):
            x, rest = torch.ops.finding.layer(x, rest)
        return torch.ops.finding.last(x)

    from torch._inductor import lowering

    lowering.lowerings.pop(torch.ops.finding.last.default, None)
    torch._dynamo.reset()
    torch.compile(model, fullgraph=True)(torch.ones(4), torch.ones(4))
    return written.get("finding.last.default", 0)


with torch._inductor.config.patch(fx_graph_cache=False):
    found = [characters(layers) for layers in (2, 4, 6, 8)]
print("characters of the log line behind 2, 4, 6 and 8 layers:", *found)
assert all(3 < after / before < 6 for before, after in zip(found, found[1:])), "changed: it doesn't double a layer"
PYTHON
"$folder/venv/bin/python" finding.py
