"""Qwen's vision tower on nine frames of 644×476, windows together or one by one: python -m benchmarks.vision_windows

Real depth, grid and windows (30 an image), width 32: what is left is the number of calls. Forward only, as the tower is
frozen; CPU seconds, in turns.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VisionTransformerPretrainedModel,
    Qwen2_5_VLVisionAttention,
)

from benchmarks.counting import HostWaits
from janus_cluster.config.networks import PRESETS
from janus_cluster.training.model.vision import GroupedVisionAttention, plan_vision

FRAMES, ROWS, COLUMNS = 9, 34, 46
PAIRS = 5


@torch.no_grad()
def main() -> None:
    """Prints the ratio, the operators of both ways, their waits and the largest difference."""
    real, tiny = PRESETS["qwen2.5-vl-7b"].vision, PRESETS["tiny"].vision
    narrow = {key: tiny[key] for key in ("hidden_size", "intermediate_size", "num_heads", "out_hidden_size")}
    torch.manual_seed(0)
    tower = Qwen2_5_VisionTransformerPretrainedModel._from_config(Qwen2_5_VLVisionConfig(**real | narrow)).eval()
    grid = torch.tensor([[1, ROWS, COLUMNS]] * FRAMES)
    patches = torch.randn(FRAMES * ROWS * COLUMNS, 1176)

    def run(kind: type) -> Any:
        for block in tower.blocks:
            block.attn.__class__ = kind
        if kind is Qwen2_5_VLVisionAttention:
            return tower(patches, grid).pooler_output
        plan = plan_vision(tower, grid, patches.device)
        return tower(
            patches, grid, **{name.removeprefix("image_"): value for name, value in plan.items()}
        ).pooler_output

    def seconds(kind: type) -> float:
        begun = time.process_time()
        run(kind)
        return time.process_time() - begun

    kinds = {"one by one": Qwen2_5_VLVisionAttention, "together": GroupedVisionAttention}
    outputs = {name: run(kind) for name, kind in kinds.items()}
    times = [{name: seconds(kind) for name, kind in kinds.items()} for _ in range(PAIRS)]
    ratios = [pair["one by one"] / pair["together"] for pair in times]
    for name, kind in kinds.items():
        with HostWaits() as waits:
            run(kind)
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            run(kind)
        events = [event for event in profiled.key_averages() if event.key.startswith("aten::")]
        attention = sum(event.count for event in events if event.key == "aten::scaled_dot_product_attention")
        print(
            f"{name:<12}{statistics.median(pair[name] for pair in times):7.3f} CPU s {attention:6} attention calls "
            f"{sum(event.count for event in events):8,} operators {sum(waits.at.values()):4} host waits"
        )
    difference = float((outputs["one by one"] - outputs["together"]).abs().max())
    print(
        f"ratio {statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f} of {PAIRS} pairs); outputs differ "
        f"by at most {difference:.1e} (largest {float(outputs['together'].abs().max()):.1f})"
    )


if __name__ == "__main__":
    main()
