"""Bytes that DeepSpeed's engines really hold of the tiny model; started by torchrun from test_plan_memory.py.

Usage: torchrun … plan_memory_worker.py OUT
Rank 0 writes to OUT: per ZeRO stage the bytes of weights, gradients and optimizer state on its rank after a backward
pass and a step, largest of the ranks, and the padding that the cut may add.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from model_cases import IDS
from model_zero_worker import make_batch
from transformers.integrations import HfDeepSpeedConfig

from janus_cluster.config.schema import Model, Training
from janus_cluster.training.model.build import build_model, parameter_groups

STAGES = (1, 2, 3)
THRESHOLD = 1000


def size(tensors: Any) -> int:
    """Bytes of all distinct storages behind the tensors."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def measure(stage: int) -> dict[str, int]:
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "zero_optimization": {
            "stage": stage, "reduce_bucket_size": 100_000, "stage3_param_persistence_threshold": THRESHOLD,
        },
        "zero_allow_untested_optimizer": True,
    }  # fmt: skip
    handle = HfDeepSpeedConfig(config)  # transformers looks for it while it lives
    training = Training()
    model = build_model(
        Model(preset="tiny"), training, tokenizer_ids=IDS, device="cpu", dtype=torch.bfloat16, seed=7
    )
    optimizer = torch.optim.AdamW(parameter_groups(model, training))
    engine, *_ = deepspeed.initialize(model=model, config=handle.config, optimizer=optimizer)
    output = engine(**make_batch([2], seed=dist.get_rank()))
    engine.backward(output.loss)
    zero = engine.optimizer
    if stage == 3:
        gradients = size([zero.grad_partitions_flat_buffer])
    elif stage == 2:
        gradients = size([g for group in zero.averaged_gradients.values() for g in group if g is not None])
    else:
        gradients = size([p.grad for p in model.parameters() if p.grad is not None])
    engine.step()
    if stage == 3:
        parameters = list(model.parameters())
        weights = size([p.ds_tensor for p in parameters]) + size([p.data for p in parameters if p.data.numel()])
        masters = zero.fp32_partitioned_groups_flat
    else:
        weights = size([p.data for p in model.parameters()])
        masters = zero.single_partition_of_fp32_groups
    moments = [t for state in zero.optimizer.state.values() for t in state.values() if torch.is_tensor(t)]
    optimizer_bytes = size([m.data for m in masters]) + size([t for t in moments if t.numel() > 1])
    values = torch.tensor([weights, gradients, optimizer_bytes])
    dist.all_reduce(values, op=dist.ReduceOp.MAX)
    engine.destroy()
    return dict(zip(("weights", "gradients", "optimizer"), values.tolist(), strict=True))


def main(out: str) -> None:
    deepspeed.init_distributed(dist_backend="gloo")
    measured = {str(stage): measure(stage) for stage in STAGES}
    if dist.get_rank() == 0:
        Path(out).write_text(json.dumps(measured))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
