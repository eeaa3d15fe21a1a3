"""Plain PyTorch workloads, with no knowledge of fusion."""

from fuseplan.workloads.models.config import (
    GPT_OSS_20B,
    GPT_OSS_20B_TINY,
    GPT_OSS_120B,
    GPT_OSS_120B_TINY,
    GptOssConfig,
)
from fuseplan.workloads.models.gpt_oss import GptOss, KVCache
from fuseplan.workloads.models.tensor_parallel import check_size, shard_
from fuseplan.workloads.models.workload import WORKLOADS, Workload, workload

__all__ = [
    "GPT_OSS_20B",
    "GPT_OSS_20B_TINY",
    "GPT_OSS_120B",
    "GPT_OSS_120B_TINY",
    "WORKLOADS",
    "GptOss",
    "GptOssConfig",
    "KVCache",
    "Workload",
    "check_size",
    "shard_",
    "workload",
]
