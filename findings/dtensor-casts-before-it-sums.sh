#!/usr/bin/env bash
# torch 2.13.0: a DTensor that is a sum over a sharded dimension keeps the sum pending, Partial(sum), and some
# operators are applied to each rank's part instead of the sum. A cast to float16 or bfloat16 is one, in which parts
# overflow or lose digits that the sum doesn't have: of 1e5 and -1e5 on two ranks the float16 sum is NaN, and 256 + 1
# + 1 + 1 is 258, not 260. The output of a row-parallel layer is cast in parts likewise. fill_(3) gives 6, and
# view(torch.int32) adds the bits. full_like and a cast to int32 are right. Nothing is raised or warned.
#
# Exit status 0: it is so today. 1: it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip --quiet --disable-pip-version-check install torch==2.13.0 numpy
cd "$folder"
cat > finding.py <<'PYTHON'
import tempfile

import torch
import torch.distributed as dist
from torch import multiprocessing
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

large = torch.tensor([[1e5], [-1e5]])
small = torch.tensor([[256.0], [1.0], [1.0], [1.0]])
cases = {
    "1e5 - 1e5 in float16": (large, lambda x: x.sum(0).half()),
    "256 + 1 + 1 + 1 in bfloat16": (small, lambda x: x.sum(0).bfloat16()),
    "256 + 1 + 1 + 1 in int32": (small, lambda x: x.sum(0).int()),
    "fill_(3) of a sum": (small, lambda x: x.sum(0).fill_(3)),
    "full_like of a sum and 3": (small, lambda x: torch.full_like(x.sum(0), 3)),
    "bits of the sum": (small, lambda x: x.sum(0).view(torch.int32)),
}


def run(rank, path, results):
    dist.init_process_group("gloo", rank=rank, world_size=2, init_method=f"file://{path}")
    mesh = init_device_mesh("cpu", (2,))
    for name, (x, function) in cases.items():
        found = function(distribute_tensor(x, mesh, [Shard(0)]))
        line = f"{name}: {found.full_tensor().item()} by two ranks, {function(x).item()} by one"
        if rank == 0:
            results.put(line)
    features, weight = torch.full((1, 8), 200.0), torch.cat([torch.full((4, 1), 100.0), torch.full((4, 1), -100.0)])
    layer = distribute_tensor(features, mesh, [Shard(1)]) @ distribute_tensor(weight, mesh, [Shard(0)])
    line = f"a row-parallel layer, in float16: {layer.half().full_tensor().item()}, {(features @ weight).half().item()}"
    if rank == 0:
        results.put(line)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    results = multiprocessing.get_context("spawn").SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(run, (f"{folder}/store", results), nprocs=2)
    for _ in range(len(cases) + 1):
        print(results.get())
PYTHON
cat > expected <<'TEXT'
1e5 - 1e5 in float16: nan by two ranks, 0.0 by one
256 + 1 + 1 + 1 in bfloat16: 258.0 by two ranks, 260.0 by one
256 + 1 + 1 + 1 in int32: 259 by two ranks, 259 by one
fill_(3) of a sum: 6.0 by two ranks, 3.0 by one
full_like of a sum and 3: 3.0 by two ranks, 3.0 by one
bits of the sum: -2088730624 by two ranks, 1132560384 by one
a row-parallel layer, in float16: nan, 0.0
TEXT
seen=$("$folder/venv/bin/python" -W ignore finding.py 2>/dev/null)
echo "$seen"
[ "$seen" = "$(cat expected)" ] || { echo "That differs from what was seen:"; cat expected; exit 1; }
