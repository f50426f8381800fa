"""One optimizer step of the tiny model under DeepSpeed; started by torchrun from test_model_zero.py.

Usage: torchrun … model_zero_worker.py STAGE WEIGHTS OUT     (WEIGHTS: a model folder, "random", or "lora": random too)
Rank 0 writes to OUT (safetensors) the weights before and after the step, the mean loss over ranks, the rope buffer.
"""

from __future__ import annotations

import sys
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from model_cases import IDS
from safetensors.torch import save_file
from transformers.integrations import HfDeepSpeedConfig

from janus_cluster.janusvln.kernels import skip_unused_kernels
from janus_cluster.janusvln.loss import action_count, text_weight_sum
from janus_cluster.janusvln.model.build import build_model, parameter_groups
from janus_cluster.job.schema import Lora, Model, Training

TRAINING = Training(learning_rate=0.5, projector_learning_rate=0.25, max_grad_norm=1000.0)


def training_for(weights: str) -> Training:
    """TRAINING, with adapters for "lora"."""
    lora = Lora(enabled=weights == "lora", rank=4, target_modules=["q_proj", "up_proj"])
    return TRAINING.model_copy(update={"lora": lora})


def model_for(weights: str) -> Model:
    return Model(preset="tiny", path=None if weights in ("random", "lora") else weights, vggt_path=None)


def make_batch(frames_per_sample: list[int], *, seed: int) -> dict[str, Any]:
    """A padded batch of random text and 70×56 frames; each sample has its own number of frames."""
    generator = torch.Generator().manual_seed(seed)
    rows, frames = [], []
    for num_frames in frames_per_sample:
        frames.append(torch.randint(0, 256, (num_frames, 3, 70, 56), dtype=torch.uint8, generator=generator))
        prompt = [1, 2] + num_frames * [593, *4 * [595], 594]
        rows.append((prompt, torch.randint(3, 500, (6,), generator=generator).tolist()))
    length = max(len(prompt) + len(target) for prompt, target in rows)
    ids = torch.full((len(rows), length), IDS.pad_token_id)
    labels, segments = torch.full_like(ids, -100), torch.zeros_like(ids)
    for i, (prompt, target) in enumerate(rows):
        ids[i, : len(prompt) + len(target)] = torch.tensor(prompt + target)
        labels[i, len(prompt) : len(prompt) + len(target)] = torch.tensor(target)
        segments[i, len(prompt) : len(prompt) + len(target)] = torch.tensor([1, 2, 2, 3, 4, 4])
    weights = torch.tensor([0.0, 1.0, 0.5, 0.7, 3.0])[segments]
    return {
        "input_ids": ids,
        "attention_mask": (ids != IDS.pad_token_id).long(),
        "mm_token_type_ids": (ids == IDS.image_token_id).long(),
        "labels": labels,
        "loss_weights": weights,
        "segment_ids": segments,
        "actions": torch.randint(0, 4, (len(rows),), generator=generator),
        "frames": frames,
        "image_grid_thw": torch.tensor([[1, 4, 4]] * sum(frames_per_sample)),
    }


# What each rank sees: one image against six, one sample against two.
RANK_FRAMES = ([1], [2, 4])


def whole_batch_denominator(num_ranks: int) -> torch.Tensor:
    """[D_text, D_action] of both ranks' samples together, as each rank's share."""
    batches = [make_batch(frames, seed=rank) for rank, frames in enumerate(RANK_FRAMES)]
    text = sum(text_weight_sum(b["labels"], b["loss_weights"]) for b in batches)
    actions = sum(action_count(b["actions"]) for b in batches)
    return torch.stack([torch.as_tensor(text), torch.as_tensor(actions)]) / num_ranks


def _whole(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    parameters = dict(model.named_parameters())
    with deepspeed.zero.GatheredParameters(list(parameters.values())):
        return {name: p.detach().clone() for name, p in parameters.items()}


def main(stage: int, weights: str, out: str) -> None:
    skip_unused_kernels()
    deepspeed.init_distributed(dist_backend="gloo")
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": TRAINING.max_grad_norm,
    }
    handle = HfDeepSpeedConfig(config)  # transformers looks for it while it lives
    training = training_for(weights)
    model = build_model(model_for(weights), training, tokenizer_ids=IDS, device="cpu", dtype=torch.float32, seed=7)
    before = _whole(model)
    optimizer = torch.optim.SGD(parameter_groups(model, training))  # the update is the gradient, to scale
    engine, *_ = deepspeed.initialize(model=model, config=handle.config, optimizer=optimizer)
    output = engine(
        **make_batch(RANK_FRAMES[dist.get_rank()], seed=dist.get_rank()),
        loss_denominator=whole_batch_denominator(dist.get_world_size()),
    )
    engine.backward(output.loss)
    engine.step()
    loss = output.loss.detach().clone()
    dist.all_reduce(loss)
    after = _whole(engine.module)
    if dist.get_rank() == 0:
        tensors = {f"before.{name}": t for name, t in before.items()} | {f"after.{n}": t for n, t in after.items()}
        tensors["loss"] = loss / dist.get_world_size()
        tensors["inv_freq"] = model.model.language_model.rotary_emb.inv_freq.clone()
        save_file(tensors, out)
    # A rank that leaves while another still works can abort in gloo's teardown.
    dist.barrier()
    engine.destroy()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
