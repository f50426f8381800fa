"""How large the network of a job is: the layers that cost time, and the parameters of each part. No torch.

Dimensions are those of modelspec/networks.py, or of the hub's config.json where `model.path` holds one; parameters are
counted from the table of names and shapes that loading is judged by.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from janus_cluster.job.schema import Lora, Model, Tune
from janus_cluster.modelspec.check_weights import check_family, load_config_values
from janus_cluster.modelspec.networks import PRESETS, Preset, VggtConfig
from janus_cluster.modelspec.weight_names import (
    ACTION_HEAD_DIM,
    NUM_ACTIONS,
    PARTS,
    VGGT_MERGER_DIM,
    VISION_DEFAULTS,
    Shapes,
    janus_shapes,
    part_of,
    vggt_shapes,
)

# The tiny preset's vocabulary is made from the data; this is the most that its tokenizer is asked for.
TINY_VOCABULARY = 1024


@dataclass(frozen=True, kw_only=True)
class Language:
    """Qwen2.5's decoder. `kv_dim` is the width of all keys of a token."""

    layers: int
    hidden: int
    wide: int
    heads: int
    kv_dim: int
    vocabulary: int

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """(in, out) of a layer's linear layers, by name."""
        return {
            "q_proj": (self.hidden, self.hidden),
            "k_proj": (self.hidden, self.kv_dim),
            "v_proj": (self.hidden, self.kv_dim),
            "o_proj": (self.hidden, self.hidden),
            "gate_proj": (self.hidden, self.wide),
            "up_proj": (self.hidden, self.wide),
            "down_proj": (self.wide, self.hidden),
        }

    @property
    def layer_weights(self) -> int:
        """Weights of one layer's matrices: each costs one multiply-add per token."""
        return sum(a * b for a, b in self.linear_shapes().values())


@dataclass(frozen=True, kw_only=True)
class Vision:
    """Qwen2.5-VL's vision tower. `window` is in merged cells; `full_blocks` attend to a whole frame."""

    depth: int
    dim: int
    wide: int
    merge: int
    window: int
    full_blocks: int
    patch_inputs: int
    out: int

    @property
    def block_weights(self) -> int:
        return 4 * self.dim**2 + 3 * self.dim * self.wide

    @property
    def merger_weights(self) -> int:
        merged = self.dim * self.merge**2
        return merged * (merged + self.out)


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """One network. `shapes` and `vggt_shapes` hold every weight; VGGT's last two blocks are not among them."""

    name: str
    language: Language
    vision: Vision
    vggt: VggtConfig
    vggt_merger_dim: int
    action_head_dim: int
    num_actions: int
    shapes: Shapes
    vggt_shapes: Shapes

    @property
    def vggt_merger_weights(self) -> int:
        inputs = self.vggt.feature_dim * self.vision.merge**2
        return self.vggt_merger_dim * (inputs + self.language.hidden)

    @cached_property
    def vggt_parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.vggt_shapes.values())

    @cached_property
    def parameters(self) -> Mapping[str, int]:
        """Parameters of every part that `training.tune` names."""
        counts = dict.fromkeys(PARTS, 0)
        for name, shape in self.shapes.items():
            counts[part_of(name)] += math.prod(shape)
        return counts

    def adapter_parameters(self, lora: Lora) -> int:
        """Parameters of the adapters, 0 without LoRA."""
        if not lora.enabled:
            return 0
        shapes = self.language.linear_shapes()
        return self.language.layers * lora.rank * sum(sum(shapes[name]) for name in lora.target_modules)

    def trained_parameters(self, tune: Tune, lora: Lora) -> int:
        """Parameters that the optimizer holds."""
        counts = dict(self.parameters)
        if lora.enabled:
            counts["llm"] = self.adapter_parameters(lora)
        return sum(count for part, count in counts.items() if getattr(tune, part))

    def trained_groups(self, tune: Tune, lora: Lora) -> list[list[int]]:
        """Elements of every trained tensor, in the order in which an engine lays its group out flat.

        The groups are those of janusvln/model/build.py: a part's matrices, and its norms and biases.
        """
        groups: dict[tuple[str, bool], list[int]] = {}
        for name, shape in self.shapes.items():
            part = part_of(name)
            if getattr(tune, part) and not (part == "llm" and lora.enabled):
                groups.setdefault((part, len(shape) < 2), []).append(math.prod(shape))
        if tune.llm and lora.enabled:
            shapes = self.language.linear_shapes()
            adapters = [lora.rank * side for name in lora.target_modules for side in shapes[name]]
            groups["llm", False] = adapters * self.language.layers
        return list(groups.values())

    def engine_parameters(self, lora: Lora) -> int:
        """Parameters of the module that DeepSpeed gets: all but VGGT's."""
        return sum(self.parameters.values()) + self.adapter_parameters(lora)

    @cached_property
    def tensor_sizes(self) -> tuple[int, ...]:
        return tuple(math.prod(shape) for shape in self.shapes.values())

    def small_parameters(self, threshold: int) -> int:
        """Parameters in tensors that ZeRO-3 keeps whole on every rank."""
        return sum(count for count in self.tensor_sizes if count <= threshold)

    @property
    def largest_tensor(self) -> int:
        return max(self.tensor_sizes)


def load_sizes(model: Model) -> Sizes:
    """The job's network: config.json in model.path where it is there, else the preset's published numbers.

    Raises: UsageError if config.json belongs to another family or size.
    """
    if model.path is None or not Path(model.path).is_dir():
        return preset_sizes(model.preset)
    folder = Path(model.path)
    values = load_config_values(folder)
    check_family(values, model, folder)
    return sizes_of(values, preset=PRESETS[model.preset], name=model.preset)


def preset_sizes(name: str) -> Sizes:
    """A preset's sizes, from its published configuration."""
    preset = PRESETS[name]
    values = {
        "text_config": {"vocab_size": TINY_VOCABULARY} | preset.text,
        "vision_config": preset.vision,
        "tie_word_embeddings": preset.tie_word_embeddings,
        "vggt_config": preset.vggt.to_dict(),
        "vggt_merger_hidden_dim": preset.vggt_merger_hidden_dim,
    }
    return sizes_of(values, preset=preset, name=name)


def sizes_of(values: Mapping[str, Any], *, preset: Preset, name: str) -> Sizes:
    """Sizes of a config.json's content (flat as on the hub, or nested); what it leaves out is the preset's."""
    text = {**preset.text, **values, **(values.get("text_config") or {})}
    vision = {**VISION_DEFAULTS, **preset.vision, **(values.get("vision_config") or {})}
    vggt = VggtConfig.from_dict(values.get("vggt_config") or {})
    heads, hidden = text["num_attention_heads"], text["hidden_size"]
    channels = vision.get("in_chans", vision["in_channels"])
    return Sizes(
        name=name,
        language=Language(
            layers=text["num_hidden_layers"],
            hidden=hidden,
            wide=text["intermediate_size"],
            heads=heads,
            kv_dim=hidden // heads * text["num_key_value_heads"],
            vocabulary=text["vocab_size"],
        ),
        vision=Vision(
            depth=vision["depth"],
            dim=vision["hidden_size"],
            wide=vision["intermediate_size"],
            merge=vision["spatial_merge_size"],
            window=vision["window_size"] // vision["spatial_merge_size"] // vision["patch_size"],
            full_blocks=len(vision["fullatt_block_indexes"]),
            patch_inputs=channels * vision["temporal_patch_size"] * vision["patch_size"] ** 2,
            out=vision["out_hidden_size"],
        ),
        vggt=vggt,
        vggt_merger_dim=values.get("vggt_merger_hidden_dim", VGGT_MERGER_DIM),
        action_head_dim=values.get("action_head_hidden_dim", ACTION_HEAD_DIM),
        num_actions=values.get("num_actions", NUM_ACTIONS),
        shapes=janus_shapes(values),
        vggt_shapes=vggt_shapes(vggt),
    )
