"""Runs random blocks that quantise, planned for GPUs, by Triton's interpreter: `FIRST LAST`; prints one JSON object."""

import json
import sys
import warnings

import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from tests.differential.quantised import all_of
from tests.providers.run_interpreted import prepare


def main() -> None:
    warnings.simplefilter("ignore")
    prepare()
    dist.init_process_group("gloo", rank=0, world_size=1, store=HashStore())
    assert dist.group.WORLD is not None
    print(json.dumps(all_of(range(*map(int, sys.argv[1:])), dist.group.WORLD.group_name, kernels=True)))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
