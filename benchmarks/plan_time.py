"""How well the plan's operations predict time: python -m benchmarks.plan_time

A network of middling size (60 million parameters, random weights, fp32) makes forward and backward passes on one CPU
thread. One number, operations a second, is taken from the first setting; the time of every other setting is predicted
from its operations (plan/flops.py) alone and compared. CPU seconds of the process, the least of several passes, so that
other work on the machine counts little. What it shows is whether time follows the counted operations from setting to
setting; it shows nothing about a GPU's share of its peak.
"""

from __future__ import annotations

import argparse
import platform
import time
from dataclasses import dataclass, field
from typing import Any

import torch

from janus_cluster.config.networks import PRESETS, VggtConfig
from janus_cluster.config.schema import Training, Tune
from janus_cluster.plan.flops import Work, count_flops
from janus_cluster.plan.sample import Sample
from janus_cluster.plan.sizes import sizes_of
from janus_cluster.training.model.build import mark_trainable, set_recompute
from janus_cluster.training.model.janus import JanusConfig, JanusModel
from janus_cluster.training.model.vggt import Aggregator

WIDTH, HEIGHT = 168, 126
TEXT_TOKENS, LABEL_TOKENS = 60, 40
IMAGE_TOKEN, START, END = 1001, 1000, 1002
VALUES: dict[str, Any] = {
    "text_config": PRESETS["tiny"].text
    | {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "vocab_size": 1024,
       "num_attention_heads": 32, "num_key_value_heads": 8, "bos_token_id": None, "eos_token_id": None},
    "vision_config": PRESETS["tiny"].vision
    | {"depth": 6, "hidden_size": 256, "intermediate_size": 768, "num_heads": 8, "out_hidden_size": 512},
    "vggt_config": VggtConfig(
        embed_dim=256, depth=5, num_heads=8, dino_depth=4, dino_num_heads=8, dino_image_size=126
    ).to_dict(),
    "vggt_merger_hidden_dim": 512,
    "tie_word_embeddings": False,
}  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """One way to make a pass."""

    name: str
    frames: int = 5
    recompute_every: int = 0
    tune: Tune = field(default_factory=Tune)


SETTINGS = (
    Setting("5 frames, nothing recomputed"),
    Setting("5 frames, every layer recomputed", recompute_every=1),
    Setting("5 frames, every second layer recomputed", recompute_every=2),
    Setting("1 frame", frames=1),
    Setting("3 frames", frames=3),
    Setting("9 frames", frames=9),
    Setting("5 frames, the ViT learns", tune=Tune(vision=True)),
    Setting("5 frames, the language model is frozen", tune=Tune(llm=False)),
)


def build() -> JanusModel:
    torch.manual_seed(0)
    ids = {"image_token_id": IMAGE_TOKEN, "vision_start_token_id": START, "vision_end_token_id": END}
    model = JanusModel(JanusConfig(**VALUES, **ids, video_token_id=1003))
    model.attach_vggt(Aggregator(model.config.vggt))
    return model.train()


def make_batch(sample: Sample) -> dict[str, Any]:
    """One sample of random text and frames, of exactly the sizes that the plan counts."""
    generator = torch.Generator().manual_seed(0)
    image = [START, *[IMAGE_TOKEN] * sample.memory_tokens, END]
    text = torch.randint(0, 900, (sample.text_tokens,), generator=generator).tolist()
    ids = torch.tensor([image * sample.frames + text])
    labels = torch.full_like(ids, -100)
    labels[0, -sample.label_tokens :] = ids[0, -sample.label_tokens :]
    shape = (sample.frames, 3, sample.height, sample.width)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == IMAGE_TOKEN).long(),
        "labels": labels,
        "actions": torch.tensor([1]),
        "frames": [torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)],
        "image_grid_thw": torch.tensor([[1, sample.rows, sample.columns]] * sample.frames),
    }


def sample_of(setting: Setting) -> Sample:
    return Sample(
        frames=setting.frames,
        width=WIDTH,
        height=HEIGHT,
        rows=HEIGHT // 28 * 2,
        columns=WIDTH // 14,
        vggt_patches=(HEIGHT // 14) * (WIDTH // 14),
        text_tokens=TEXT_TOKENS,
        label_tokens=LABEL_TOKENS,
    )


def measure(model: JanusModel, setting: Setting, passes: int) -> float:
    """CPU seconds of one pass, the least of `passes`, the first one apart."""
    training = Training(
        tune=setting.tune,
        gradient_checkpointing=setting.recompute_every > 0,
        gradient_checkpointing_every=max(1, setting.recompute_every),
    )
    mark_trainable(model, training)
    set_recompute(model, training)
    batch = make_batch(sample_of(setting))
    times_s = []
    for _ in range(passes + 1):
        model.zero_grad(set_to_none=True)
        begun = time.process_time()
        model(**batch).loss.backward()
        times_s.append(time.process_time() - begun)
    return min(times_s[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passes", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    sizes = sizes_of(VALUES, preset=PRESETS["tiny"], name="middling")
    model = build()
    count = sum(sizes.parameters.values())
    print(f"{platform.machine()}, one thread, torch {torch.__version__}, fp32, {count:,} parameters")
    print(f"{'':<40} {'GFLOP':>7} {'measured':>9} {'predicted':>9}  error")
    rate = 0.0
    for setting in SETTINGS:
        # The CPU's attention kernel computes the causal half only, as a GPU's flash kernel does.
        work = Work(tune=setting.tune, recompute_every=setting.recompute_every)
        flops = count_flops(sizes, sample_of(setting), work).total
        seconds = measure(model, setting, options.passes)
        rate = rate or flops / seconds
        error = f"{flops / rate / seconds - 1:+.0%}" if setting is not SETTINGS[0] else "(gives the rate)"
        print(f"{setting.name:<40} {flops / 1e9:7.1f} {seconds:8.3f}s {flops / rate:8.3f}s  {error}", flush=True)


if __name__ == "__main__":
    main()
