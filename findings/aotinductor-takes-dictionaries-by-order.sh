#!/usr/bin/env bash
# torch 2.13.0: a package of AOTInductor for a model that takes a dictionary takes the values in the order in which
# they were put in. {"b": b, "a": a} instead of {"a": a, "b": b} swaps both, silently where the shapes are alike: as
# key and query, or image and mask. torch.export's own module and torch.compile look the keys up. Keyword arguments in
# another order are right.
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
from torch._inductor import aoti_compile_and_package, aoti_load_package


class Model(torch.nn.Module):
    def forward(self, inputs):
        return inputs["a"] - inputs["b"]


class Keywords(torch.nn.Module):
    def forward(self, a, b):
        return a - b


a, b = torch.full((2,), 5.0), torch.full((2,), 3.0)
program = torch.export.export(Model(), ({"a": a, "b": b},))
loaded = aoti_load_package(aoti_compile_and_package(program, package_path="model.pt2"))
for inputs in ({"a": a, "b": b}, {"b": b, "a": a}):
    found = [function(inputs)[0].item() for function in (loaded, program.module(), torch.compile(Model()))]
    print(f"keys {list(inputs)}: packaged {found[0]}, exported {found[1]}, compiled {found[2]}")
program = torch.export.export(Keywords(), (), {"a": a, "b": b})
loaded = aoti_load_package(aoti_compile_and_package(program, package_path="keywords.pt2"))
print("keywords b, a: packaged", loaded(b=b, a=a)[0].item())
PYTHON
cat > expected <<'TEXT'
keys ['a', 'b']: packaged 2.0, exported 2.0, compiled 2.0
keys ['b', 'a']: packaged -2.0, exported 2.0, compiled 2.0
keywords b, a: packaged 2.0
TEXT
seen=$("$folder/venv/bin/python" -W ignore finding.py 2>/dev/null)
echo "$seen"
[ "$seen" = "$(cat expected)" ] || { echo "That differs from what was seen:"; cat expected; exit 1; }
