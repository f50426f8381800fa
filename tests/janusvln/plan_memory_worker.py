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

from janus_cluster.janusvln.kernels import skip_unused_kernels
from janus_cluster.janusvln.model.build import build_model, parameter_groups
from janus_cluster.job.schema import Model, Training

STAGES = (1, 2, 3)
THRESHOLD = 1000


def size(tensors: Any) -> int:
    """Bytes of all distinct storages behind the tensors."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def gradients_of(engine: Any, stage: int) -> list[torch.Tensor]:
    """The gradients that this rank keeps at the end of a backward pass: all of them, or its part."""
    if stage == 3:
        return [engine.optimizer.grad_partitions_flat_buffer]
    if stage == 2:
        return [tensor for group in engine.optimizer.averaged_gradients.values() for tensor in group or []]
    return [p.grad for p in engine.module.parameters() if p.grad is not None]


def measure(stage: int) -> dict[str, int]:
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 2,
        "bf16": {"enabled": True},
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": 100_000,
            "allgather_bucket_size": 100_000,
            "stage3_param_persistence_threshold": THRESHOLD,
        },
        "zero_allow_untested_optimizer": True,
    }
    handle = HfDeepSpeedConfig(config)  # transformers looks for it while it lives
    training = Training()
    model = build_model(Model(preset="tiny"), training, tokenizer_ids=IDS, device="cpu", dtype=torch.bfloat16, seed=7)
    optimizer = torch.optim.AdamW(parameter_groups(model, training))
    engine, *_ = deepspeed.initialize(model=model, config=handle.config, optimizer=optimizer)
    zero, gradients = engine.optimizer, 0
    for micro_step in range(2):
        output = engine(**make_batch([2], seed=dist.get_rank()))
        engine.backward(output.loss)
        # ZeRO-1 lets go of whole gradients when the last micro-step has reduced them; ZeRO-2 flattens its part then.
        if micro_step == int(stage == 2):
            # Views: a tensor that two ranks share keeps its whole gradient alive, on top of what is each rank's part.
            gradients = sum(g.numel() * g.element_size() for g in gradients_of(engine, stage))
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
    skip_unused_kernels()
    deepspeed.init_distributed(dist_backend="gloo")
    measured = {str(stage): measure(stage) for stage in STAGES}
    if dist.get_rank() == 0:
        Path(out).write_text(json.dumps(measured))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
