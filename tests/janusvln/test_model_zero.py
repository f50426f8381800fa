"""The network under DeepSpeed on two processes: the step is that of one process, whatever ZeRO stage shards it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from model_cases import CHECKPOINT, IDS
from model_zero_worker import RANK_FRAMES, make_batch, model_for, training_for, whole_batch_denominator
from safetensors.torch import load_file, save_file

from janus_cluster.janusvln.model.build import build_model, parameter_groups

pytestmark = pytest.mark.train

WORKER = Path(__file__).with_name("model_zero_worker.py")


def run_workers(stage: int, weights: str, out: Path) -> dict[str, torch.Tensor]:
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d"]
    command = [sys.executable, *torchrun, "--rdzv-endpoint=127.0.0.1:0", str(WORKER), str(stage), weights, str(out)]
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(out)


def one_process(weights: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], float]:
    training = training_for(weights)
    model = build_model(model_for(weights), training, tokenizer_ids=IDS, device="cpu", dtype=torch.float32, seed=7)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(parameter_groups(model, training))
    loss = 0.0
    for rank, frames in enumerate(RANK_FRAMES):
        out = model(**make_batch(frames, seed=rank), loss_denominator=whole_batch_denominator(1))
        out.loss.backward()
        loss += float(out.loss.detach())
    optimizer.step()
    return before, {name: p.detach() for name, p in model.named_parameters()}, loss


def hub_folder(folder: Path) -> str:
    """A Qwen2.5-VL folder without merger and action head, VGGT beside it: the other way in under ZeRO-3."""
    folder.mkdir()
    stored = load_file(CHECKPOINT / "model.safetensors")
    qwen = {name: t for name, t in stored.items() if name.startswith(("model.", "visual.", "lm_head."))}
    save_file(qwen, folder / "model.safetensors", metadata={"format": "pt"})
    vggt = {name.removeprefix("vggt."): t for name, t in stored.items() if name.startswith("vggt.")}
    save_file(vggt, folder / "vggt.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text((CHECKPOINT / "config.json").read_text(encoding="utf-8"), encoding="utf-8")
    return str(folder)


@pytest.mark.parametrize(("stage", "source"), [(2, "random"), (3, "random"), (3, "hub"), (3, "lora")])
def test_two_processes_make_the_step_of_one(stage: int, source: str, tmp_path: Path) -> None:
    weights = hub_folder(tmp_path / "hub") if source == "hub" else source
    before, after, loss = one_process(weights)
    sharded = run_workers(stage, weights, tmp_path / "out.safetensors")
    assert float(sharded["loss"]) == pytest.approx(loss, rel=1e-5)
    assert sharded["inv_freq"].dtype == torch.float32
    for name, start in before.items():
        assert torch.equal(sharded[f"before.{name}"], start), name
        assert torch.allclose(sharded[f"after.{name}"], after[name], atol=1e-5), name
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    adapter = "model.language_model.layers.0.self_attn.q_proj.lora_B.default.weight"
    learns = adapter if source == "lora" else "lm_head.weight"
    assert {learns, "merger.mlp.0.weight", "action_head.0.weight"} <= moved
    assert ("lm_head.weight" in moved) == (source != "lora")
    assert "model.visual.blocks.0.mlp.up_proj.weight" not in moved
