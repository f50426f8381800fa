"""Gradients that ZeRO-1 and 2 engines really keep; started by torchrun from test_plan_counts.py.

Usage: torchrun … plan_gradient_worker.py OUT
Rank 0 writes to OUT, by stage, of the fullest rank: elements kept between the two micro-steps of a step (`sums`), their
bytes, and elements of the copy that the last backward pass fills (`copy`); and the elements of every trained tensor.
"""

from __future__ import annotations

import json
import sys
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist

from benchmarks.ways import OURS, SIZES, Bench, Rig
from janus_cluster.janusvln.kernels import skip_unused_kernels


def measure(bench: Bench, stage: str) -> dict[str, Any]:
    rig = Rig(bench, replace(OURS, zero=stage))
    zero, copied = rig.engine.optimizer, [0]

    def note(_: torch.Tensor) -> None:
        copied.append(0 if zero.grads_in_partition is None else zero.grads_in_partition.numel())

    first, last = rig.load()
    rig.engine.backward(rig.engine(**first).loss)
    rig.engine.step()
    sums = [t for group in zero.all_grad_tensors.values() for t in group or []]
    if stage == "1":
        sums = [p.grad for p in rig.engine.module.parameters() if p.grad is not None]
    kept = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in sums}
    for parameter in rig.engine.module.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(note)
    rig.engine.backward(rig.engine(**last).loss)
    rig.engine.step()
    values = torch.tensor([sum(t.numel() for t in sums), sum(kept.values()), max(copied)])
    dist.all_reduce(values, op=dist.ReduceOp.MAX)
    groups = [[p.numel() for p in group] for group in zero.bit16_groups]
    rig.close()
    return dict(zip(("sums", "bytes", "copy"), values.tolist(), strict=True)) | {"groups": groups}


def main(out: str) -> None:
    warnings.filterwarnings("ignore")
    skip_unused_kernels()
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder) / "demo", size=SIZES["tiny"], device="cpu", accumulation=2)
        found = {stage: measure(bench, stage) for stage in ("1", "2")}
    if dist.get_rank() == 0:
        Path(out).write_text(json.dumps(found), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
