#!/usr/bin/env bash
# torch 2.11.0: a package of AOTInductor calls a custom op that takes a dtype with another one than the model has.
# The package has the number that torch.export's schema gives a dtype, and its loader takes that for the number that
# C++ gives one: bfloat16 becomes quint8, int64 becomes float16, float8_e4m3fn becomes uint64. No error is raised. In
# eager mode and by torch.export's own module the op gets what the model names. By torch 2.13.0 the package does, too.
#
# Exit status 0: it is so today. 1: it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
cat > finding.py <<'PYTHON'
import torch
from torch._inductor import aoti_compile_and_package, aoti_load_package

seen = []


@torch.library.custom_op("demo::told", mutates_args=())
def told(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    seen.append(str(dtype).removeprefix("torch."))
    return x.clone()


@told.register_fake
def _(x, dtype):
    return x.clone()


class Model(torch.nn.Module):
    def __init__(self, dtype):
        super().__init__()
        self.dtype = dtype

    def forward(self, x):
        return torch.ops.demo.told(x, self.dtype)


x = torch.ones(3)
for dtype in (torch.float32, torch.bfloat16, torch.int64, torch.float8_e4m3fn):
    model = Model(dtype)
    program = torch.export.export(model, (x,))
    loaded = aoti_load_package(aoti_compile_and_package(program, package_path="model.pt2"))
    seen.clear()
    for function in (model, program.module(), loaded):
        function(x)
    print("{} in eager mode, exported {}, packaged {}".format(*seen))
PYTHON
cat > expected <<'TEXT'
torch 2.11.0
float32 in eager mode, exported float32, packaged float64
bfloat16 in eager mode, exported bfloat16, packaged quint8
int64 in eager mode, exported int64, packaged float16
float8_e4m3fn in eager mode, exported float8_e4m3fn, packaged uint64
torch 2.13.0
float32 in eager mode, exported float32, packaged float32
bfloat16 in eager mode, exported bfloat16, packaged bfloat16
int64 in eager mode, exported int64, packaged int64
float8_e4m3fn in eager mode, exported float8_e4m3fn, packaged float8_e4m3fn
TEXT
seen=$(for version in 2.11.0 2.13.0; do
    python3 -m venv "venv-$version"
    "venv-$version/bin/python" -m pip --quiet --disable-pip-version-check install "torch==$version" numpy >&2
    echo "torch $version"
    "venv-$version/bin/python" -W ignore finding.py 2>/dev/null
done)
echo "$seen"
[ "$seen" = "$(cat expected)" ] || { echo "That differs from what was seen:"; cat expected; exit 1; }
