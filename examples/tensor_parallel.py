"""A model split over two ranks by its own plan, generating on a static cache, stock and by fuseplan.

torchrun --nproc-per-node 2 examples/tensor_parallel.py
"""

import shutil
import tempfile

import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.distributed import DistributedConfig

import fuseplan

TINY = LlamaConfig(hidden_size=64, intermediate_size=128, num_attention_heads=4, num_hidden_layers=1, vocab_size=128)
GENERATE = {"cache_implementation": "static", "max_new_tokens": 8, "do_sample": False, "disable_compile": True}

dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
if dist.get_rank() == 0:
    torch.manual_seed(0)
    LlamaForCausalLM(TINY).to(torch.bfloat16).save_pretrained(folder[0])
dist.broadcast_object_list(folder)
model = LlamaForCausalLM.from_pretrained(folder[0], distributed_config=DistributedConfig(tp_plan="auto"))

forward, reports = model.forward, []
ordered = fuseplan.PassConfig(policy="ordered(allreduce_rms)")  # whatever it costs, here by the reference
fused = fuseplan.compile(forward, config=ordered, on_report=reports.append)
prompt = torch.arange(1, 7, device=model.device)[None]
for name, model.forward in {"stock": torch.compile(forward), "fused": fused}.items():
    tokens = model.generate(prompt, **GENERATE)[0, 6:].tolist()
    if dist.get_rank() == 0:
        print(f"{name}  {tokens}")
if dist.get_rank() == 0:
    for report, graph in zip(reports, ("prompt", "decoding"), strict=True):
        print(f"{graph}: {report.fused}")
    shutil.rmtree(folder[0])
dist.destroy_process_group()
