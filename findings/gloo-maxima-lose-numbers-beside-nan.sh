#!/usr/bin/env bash
# torch 2.13.0: all_reduce by MAX or MIN over gloo, of numbers of which one is NaN, gives neither NaN nor the largest
# of the others: it depends on the rank that has the NaN, and on the place in the tensor. Of 0, NaN and 2 on three
# ranks the maximum is 0 in some places and NaN in others; of 0, 1 and NaN the minimum is 0 or 1. Nobody is told.
# torch.amax and torch.amin give NaN. A scale of fp8 that ranks agree on by a maximum may be smaller than one that a
# rank has.
#
# Exit status 0: it is so today. 1: it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip --quiet --disable-pip-version-check install torch==2.13.0 numpy
cd "$folder"
cat > finding.py <<'PYTHON'
import itertools
import tempfile

import torch
import torch.distributed as dist
from torch import multiprocessing


def reduce(rank, path, results):
    dist.init_process_group("gloo", rank=rank, world_size=3, init_method=f"file://{path}")
    for order, operator in itertools.product(([0.0, torch.nan, 2.0], [0.0, 1.0, torch.nan]), ("MAX", "MIN")):
        x = torch.full((3,), order[rank])
        dist.all_reduce(x, getattr(dist.ReduceOp, operator))
        results.put((rank, f"{operator} of {order} on ranks 0 to 2, in three places: {x.tolist()}"))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    results = multiprocessing.get_context("spawn").SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(reduce, (f"{folder}/store", results), nprocs=3)
    found = [results.get() for _ in range(12)]
    for _, line in (each for each in found if each[0] == 0):
        print(line, "alike on all ranks:", sum(line == other for _, other in found) == 3)
PYTHON
cat > expected <<'TEXT'
MAX of [0.0, nan, 2.0] on ranks 0 to 2, in three places: [0.0, 0.0, nan] alike on all ranks: True
MIN of [0.0, nan, 2.0] on ranks 0 to 2, in three places: [0.0, 0.0, nan] alike on all ranks: True
MAX of [0.0, 1.0, nan] on ranks 0 to 2, in three places: [1.0, 1.0, 1.0] alike on all ranks: True
MIN of [0.0, 1.0, nan] on ranks 0 to 2, in three places: [0.0, 0.0, 1.0] alike on all ranks: True
TEXT
seen=$("$folder/venv/bin/python" -W ignore finding.py 2>/dev/null)
echo "$seen"
[ "$seen" = "$(cat expected)" ] || { echo "That differs from what was seen:"; cat expected; exit 1; }
