"""The bytes that plan/memory.py predicts, against tensors of real engines and what autograd really keeps."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from model_cases import IDS
from model_zero_worker import make_batch
from plan_memory_worker import THRESHOLD
from torch import nn
from transformers import Qwen2_5_VLTextConfig, Qwen2_5_VLTextModel

from janus_cluster.janusvln.model.build import _parts, build_model
from janus_cluster.janusvln.model.janus import JanusModel
from janus_cluster.janusvln.model.presets import build_config
from janus_cluster.janusvln.model.vggt import Aggregator
from janus_cluster.job.schema import Model, Training, Tune
from janus_cluster.modelspec.networks import PRESETS, VggtConfig
from janus_cluster.modelspec.sizes import Sizes, preset_sizes, sizes_of
from janus_cluster.modelspec.weight_names import PARTS
from janus_cluster.plan.flops import Work
from janus_cluster.plan.memory import activation_bytes, layer_bytes_per_token, state_bytes
from janus_cluster.plan.sample import Sample
from janus_cluster.plan.setup import Setup

pytestmark = pytest.mark.train

IDS_VOCABULARY = 600  # what the tokenizer's 596 ids become, in rows of the head
WORKER = Path(__file__).with_name("plan_memory_worker.py")


def _cpu_attention_keeps_scores() -> bool:
    """Whether this torch computes grouped heads on a CPU as plain products, whose scores a GPU never keeps."""
    query, key = (torch.zeros(1, heads, 64, 16, requires_grad=True) for heads in (4, 2))
    shapes: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (shapes.append(t.shape), t)[1], lambda t: t):
        nn.functional.scaled_dot_product_attention(query, key, key, is_causal=True, enable_gqa=True)
    return any(shape[-2:] == (64, 64) for shape in shapes)


measures_on_cpu = pytest.mark.skipif(
    _cpu_attention_keeps_scores(),
    reason="this torch has no CPU kernel for grouped heads (2.8 has none), so a CPU pass keeps more than a GPU's; "
    "test_plan_counts.py follows the bytes of the GPU's kernel with every torch",
)


def tiny_sizes() -> Sizes:
    return sizes_of(build_config(Model(preset="tiny"), IDS).to_dict(), preset=PRESETS["tiny"], name="tiny")


def kept_bytes(module: nn.Module, **batch: object) -> int:
    """Bytes that one forward pass keeps for its backward pass, parameters apart, each storage once."""
    torch.set_num_threads(1)
    own = {p.untyped_storage().data_ptr() for p in module.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor  # holding it keeps the address from being used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        module(**batch)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("preset", ["tiny", "qwen2.5-vl-3b", "qwen2.5-vl-7b"])
def test_every_part_has_as_many_parameters_as_the_modules(preset: str) -> None:
    with torch.device("meta"):
        model = JanusModel(build_config(Model(preset=preset), IDS if preset == "tiny" else None))
        aggregator = Aggregator(model.config.vggt)
    sizes = tiny_sizes() if preset == "tiny" else preset_sizes(preset)
    real = {part: sum(p.numel() for p in parameters.values()) for part, parameters in _parts(model).items()}
    assert sizes.parameters == real
    assert set(real) == set(PARTS)
    assert sizes.vggt_parameters == sum(p.numel() for p in aggregator.parameters())


def text_model(dims: tuple[int, int, int, int], layers: int, dtype: torch.dtype) -> nn.Module:
    hidden, wide, heads, kv_heads = dims
    config = Qwen2_5_VLTextConfig(
        vocab_size=64, hidden_size=hidden, intermediate_size=wide, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, bos_token_id=None, eos_token_id=None, use_cache=False,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
    )  # fmt: skip
    return Qwen2_5_VLTextModel(config).to(dtype).train()


@measures_on_cpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dims", [(64, 128, 4, 2), (128, 96, 8, 2), (64, 256, 4, 4)])
def test_a_language_layer_keeps_what_the_formula_gives_to_the_byte(
    dims: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    tokens = 96
    ids = torch.zeros(1, tokens, dtype=torch.long)
    positions = torch.arange(tokens).expand(3, 1, tokens)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": positions}
    one, three = (kept_bytes(text_model(dims, layers, dtype), **batch) for layers in (1, 3))
    hidden, wide, heads, kv_heads = dims
    tiny = PRESETS["tiny"].text | {
        "hidden_size": hidden, "intermediate_size": wide, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "vocab_size": 64,
    }  # fmt: skip
    values = {"text_config": tiny, "vggt_config": VggtConfig().to_dict()}
    sizes = sizes_of(values, preset=PRESETS["tiny"], name="tiny")
    assert (three - one) / 2 / tokens == layer_bytes_per_token(sizes, dtype.itemsize)


@measures_on_cpu
@pytest.mark.parametrize("recompute_every", [0, 1, 2])
@pytest.mark.parametrize("vision", [False, True])
def test_the_whole_network_keeps_about_what_is_predicted(recompute_every: int, vision: bool) -> None:
    tune = Tune(vision=vision)
    training = Training(
        tune=tune, gradient_checkpointing=recompute_every > 0, gradient_checkpointing_every=max(1, recompute_every)
    )
    model = build_model(Model(preset="tiny"), training, tokenizer_ids=IDS, device="cpu", dtype=torch.bfloat16, seed=0)
    frames = 9
    real = kept_bytes(model, **make_batch([frames], seed=0))
    sample = Sample(
        frames=frames, width=56, height=70, rows=4, columns=4, vggt_patches=20, text_tokens=8, label_tokens=6
    )
    setup = Setup(
        nodes=1, ranks_per_node=1, stage=2, offload_optimizer=False, offload_parameters=False, micro_batch=1,
        accumulation=1, element_bytes=2, work=Work(tune=tune, recompute_every=recompute_every),
    )  # fmt: skip
    log_probabilities = 4 * sample.label_tokens * IDS_VOCABULARY
    predicted = activation_bytes(tiny_sizes(), sample, setup) + log_probabilities
    print(
        f"every {recompute_every}, vision {vision}: {predicted:.0f} predicted, {real} kept: {predicted / real - 1:+.1%}"
    )
    assert predicted == pytest.approx(real, rel=0.1)


def test_engines_hold_the_predicted_bytes(tmp_path: Path) -> None:
    out = tmp_path / "measured.json"
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d"]
    command = [sys.executable, *torchrun, "--rdzv-endpoint=127.0.0.1:0", str(WORKER), str(out)]
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    sizes = tiny_sizes()
    for stage, real in json.loads(out.read_text()).items():
        setup = Setup(
            nodes=1, ranks_per_node=2, stage=int(stage), offload_optimizer=False, offload_parameters=False,
            micro_batch=1, accumulation=1, element_bytes=2, work=Work(), persistence_threshold=THRESHOLD,
        )  # fmt: skip
        predicted = dict(zip(("weights", "gradients", "optimizer"), state_bytes(sizes, setup), strict=True))
        for part, expected in predicted.items():
            print(f"ZeRO-{stage} {part}: {expected:.0f} predicted, {real[part]} held: {expected / real[part] - 1:+.2%}")
            # A flat tensor is rounded up to a multiple of the ranks; nothing else may differ.
            assert real[part] == pytest.approx(expected, rel=0.01), f"ZeRO-{stage} {part}"
