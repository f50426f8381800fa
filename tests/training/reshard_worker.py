"""A small network under DeepSpeed, to write checkpoints in one cut and carry them to another; under torchrun.

Usage: torchrun … reshard_worker.py PLAN.json     (a list of cases, worked off one after another)
A case: {"config": {…}, "from": FOLDER or null, "steps": N, "out": FOLDER}
Its state comes from FOLDER (or from the seed), N steps are made, and what there is then is saved to `out`; rank 0 also
keeps there the weights that the network computes with.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import nn

from janus_cluster.janusvln.kernels import skip_unused_kernels
from janus_cluster.training.reshard import load_resharded
from janus_cluster.training.world import run_and_leave

MODEL_WEIGHTS = "model_weights.pt"


class Network(nn.Module):
    """Sizes that no small number of ranks divides, and a frozen part in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(7, 13)
        self.frozen = nn.Linear(13, 13)
        self.last = nn.Linear(13, 5)
        self.frozen.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.tanh(self.frozen(torch.tanh(self.first(x))))).square().mean()


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    """Two groups whose settings differ, in another order than the network's."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return [
        {"name": "weights", "params": [named["last.weight"], named["first.weight"]], "lr": 1e-2, "weight_decay": 0.1},
        {"name": "biases", "params": [named["first.bias"], named["last.bias"]], "lr": 3e-2, "weight_decay": 0.0},
    ]


def names_of(model: nn.Module) -> list[list[str]]:
    name_of = {id(p): name for name, p in model.named_parameters()}
    return [[name_of[id(p)] for p in group["params"]] for group in groups_of(model)]


def work(case: dict[str, Any]) -> None:
    # Another seed for the resumed run: nothing may be right by chance.
    torch.manual_seed(1 if case["from"] is None else 2)
    model = Network()
    dtype = torch.bfloat16 if case["config"].get("bf16", {}).get("enabled") else torch.float32
    model.to(dtype)
    optimizer = torch.optim.AdamW(groups_of(model))
    base = {
        "train_micro_batch_size_per_gpu": 4,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    engine, *_ = deepspeed.initialize(model=model, config=base | case["config"], optimizer=optimizer)
    if case["from"] is not None:
        load_resharded(engine, Path(case["from"]), groups=groups_of(model))
    generator = torch.Generator().manual_seed(3 + dist.get_rank())
    for step in range(case["steps"]):
        for group in engine.optimizer.param_groups:
            group["lr"] *= 0.5**step
        engine.backward(engine(torch.randn(4, 7, generator=generator).to(dtype)))
        engine.step()
    engine.save_checkpoint(case["out"], exclude_frozen_parameters=True)
    parameters = [p for p in model.parameters() if p.requires_grad]
    with deepspeed.zero.GatheredParameters(parameters):
        kept = {name: p.detach().float().clone() for name, p in model.named_parameters() if p.requires_grad}
    if dist.get_rank() == 0:
        torch.save(kept, Path(case["out"]) / MODEL_WEIGHTS)
    dist.barrier()
    engine.destroy()


def main(plan: Path) -> None:
    skip_unused_kernels()
    deepspeed.init_distributed(dist_backend="gloo")
    for case in json.loads(plan.read_text(encoding="utf-8")):
        work(case)
        print("done", case["out"], flush=True)
    # A rank that leaves while another still works can abort in gloo's teardown.
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    run_and_leave(partial(main, Path(sys.argv[1])))
