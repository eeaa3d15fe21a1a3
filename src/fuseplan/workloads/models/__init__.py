"""Plain PyTorch workloads, with no knowledge of fusion."""

from fuseplan.workloads.models.config import GPT_OSS_120B
from fuseplan.workloads.models.gpt_oss import GptOss, KVCache
from fuseplan.workloads.models.tensor_parallel import check_size, shard_
from fuseplan.workloads.models.workload import WORKLOADS, Workload, workload
