"""Bytes that DeepSpeed's engines really send, micro-step by micro-step; started by torchrun from test_plan_traffic.py.

Usage: torchrun … plan_traffic_worker.py OUT
Rank 0 writes to OUT: per ZeRO stage, for each micro-step of the second optimizer step, the payload bytes of
every kind of collective. The whole tensor counts, as each rank puts it in or gets it out.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from model_cases import IDS
from model_zero_worker import make_batch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.integrations import HfDeepSpeedConfig

from janus_cluster.janusvln.kernels import skip_unused_kernels
from janus_cluster.janusvln.model.build import build_model, parameter_groups
from janus_cluster.job.schema import Model, Training

STAGES = (1, 2, 3)
ACCUMULATION = 3
# Which argument holds the whole payload.
WHOLE = {"allreduce_": 0, "_allgather_base_": 0, "allgather_into_tensor_coalesced_": 0, "_reduce_scatter_base_": 1}


class Counting(TorchDispatchMode):
    """Adds up the payload of every collective that passes by."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func._opname
            tensors = args[WHOLE.get(name, 0)]
            tensors = tensors if isinstance(tensors, (list, tuple)) else [tensors]
            self.bytes[name] += sum(t.numel() * t.element_size() for t in tensors if torch.is_tensor(t))
        return func(*args, **(kwargs or {}))


def measure(stage: int) -> list[dict[str, int]]:
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": ACCUMULATION,
        "bf16": {"enabled": True},
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": 100_000,
            "allgather_bucket_size": 100_000,
            "stage3_param_persistence_threshold": 0,
            "stage3_max_live_parameters": 0,
            "stage3_max_reuse_distance": 0,
        },
        "zero_allow_untested_optimizer": True,
    }
    handle = HfDeepSpeedConfig(config)  # transformers looks for it while it lives
    training = Training(gradient_checkpointing=False)
    model = build_model(Model(preset="tiny"), training, tokenizer_ids=IDS, device="cpu", dtype=torch.bfloat16, seed=7)
    optimizer = torch.optim.AdamW(parameter_groups(model, training))
    engine, *_ = deepspeed.initialize(model=model, config=handle.config, optimizer=optimizer)
    found: list[dict[str, int]] = []
    for micro_step in range(2 * ACCUMULATION):
        with Counting() as counting:
            engine.backward(engine(**make_batch([2], seed=dist.get_rank())).loss)
            engine.step()
        if micro_step >= ACCUMULATION:
            found.append(dict(counting.bytes))
    engine.destroy()
    return found


def main(out: str) -> None:
    skip_unused_kernels()
    deepspeed.init_distributed(dist_backend="gloo")
    measured = {str(stage): measure(stage) for stage in STAGES}
    if dist.get_rank() == 0:
        Path(out).write_text(json.dumps(measured))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
