"""A JanusModel as a job describes it: weights in, VGGT attached, adapters in place, the trainable parts marked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.modeling_utils import set_zero3_state

from janus_cluster.errors import UsageError
from janus_cluster.janusvln.model.attention import use_kernels_of_any_length
from janus_cluster.janusvln.model.janus import JanusModel
from janus_cluster.janusvln.model.load import load_model, load_vggt
from janus_cluster.janusvln.model.lora import add_adapters, is_adapter
from janus_cluster.janusvln.model.presets import TokenizerIds, build_config
from janus_cluster.janusvln.model.vggt import Aggregator
from janus_cluster.job.schema import Model, Training
from janus_cluster.modelspec.weight_names import PARTS, part_of


def build_model(
    model_cfg: Model,
    training_cfg: Training,
    *,
    tokenizer_ids: TokenizerIds,
    device: torch.device | str,
    dtype: torch.dtype,
    seed: int,
) -> JanusModel:
    """The job's network in training mode, frozen as the job sets it, VGGT attached on `device`.

    Weights come from model.path; `tiny` without a path is random from the seed, the same on every rank. Under ZeRO-3
    (TrainingArguments made before) a loaded model is partitioned at once; DeepSpeed moves it.
    Raises: UsageError on missing, misshapen or foreign weights, naming file and key.
    """
    use_kernels_of_any_length()
    if model_cfg.path is not None:
        model, aggregator = load_model(model_cfg, tokenizer_ids=tokenizer_ids, device=device, dtype=dtype, seed=seed)
    elif model_cfg.preset == "tiny":
        model, aggregator = _random_model(model_cfg, tokenizer_ids, dtype=dtype, seed=seed)
        if model_cfg.vggt_path is not None:
            aggregator = load_vggt(Path(model_cfg.vggt_path), model.config.vggt, device=device, dtype=dtype)
    else:
        raise UsageError(f"model.path: preset {model_cfg.preset} needs weights", hint="--set model.path=/path/to/model")
    if training_cfg.compile == "vggt":
        from janus_cluster.janusvln.model.compile import compile_blocks

        # Frozen and outside the engine: no hook of DeepSpeed's sees these blocks, and no checkpoint holds them.
        compile_blocks(aggregator)
    model.attach_vggt(aggregator.to(device))
    if training_cfg.lora.enabled:
        add_adapters(model, training_cfg.lora, seed=seed)
    if not is_deepspeed_zero3_enabled():
        model.to(device)
    mark_trainable(model, training_cfg)
    set_recompute(model, training_cfg)
    model.train()
    return model


def _random_model(
    model_cfg: Model, ids: TokenizerIds, *, dtype: torch.dtype, seed: int
) -> tuple[JanusModel, Aggregator]:
    # Not under zero.Init: the same seed gives the same weights with and without ZeRO-3; the engine partitions them.
    with torch.random.fork_rng(devices=[]), set_zero3_state():
        torch.manual_seed(seed)
        model = JanusModel._from_config(build_config(model_cfg, ids), dtype=dtype)
        return model, Aggregator(model.config.vggt).to(dtype)


def set_recompute(model: JanusModel, training_cfg: Training) -> None:
    """Every n-th language layer recomputes its activations in the backward pass; the vision tower all, where it learns.

    A frozen vision tower has nothing to recompute: nothing before it learns, so its activations are not kept.
    """
    model.activation_checkpointing_disable()
    if not training_cfg.gradient_checkpointing:
        return
    # Each part separately: transformers would count the vision blocks as the first layers.
    model.model.language_model.activation_checkpointing_enable(every_n_layers=training_cfg.gradient_checkpointing_every)
    if training_cfg.tune.vision:
        model.model.visual.activation_checkpointing_enable()


def mark_trainable(model: JanusModel, training_cfg: Training) -> None:
    """requires_grad is set on exactly the parts that training.tune names; with LoRA, on adapters instead of the LLM."""
    model.requires_grad_(False)
    for part, parameters in _parts(model).items():
        for name, parameter in parameters.items():
            learns = getattr(training_cfg.tune, part)
            if part == "llm" and training_cfg.lora.enabled:
                learns = learns and is_adapter(name)
            parameter.requires_grad_(learns)


def _parts(model: nn.Module) -> dict[str, dict[str, nn.Parameter]]:
    """Every parameter, once, by the part of training.tune it belongs to (tied weights belong to the LLM)."""
    parts: dict[str, dict[str, nn.Parameter]] = {part: {} for part in PARTS}
    for name, parameter in model.named_parameters():
        parts[part_of(name)][name] = parameter
    return parts


def parameter_groups(model: nn.Module, training_cfg: Training) -> list[dict[str, Any]]:
    """Optimizer groups of the trainable parameters, none empty; norms and biases are not decayed.

    Returns: dictionaries with name, params, lr and weight_decay.
    """
    rates = {
        "projector": training_cfg.projector_learning_rate,
        "vggt_merger": training_cfg.projector_learning_rate,
        "vision": training_cfg.vision_learning_rate,
    }
    groups = []
    for part, parameters in _parts(model).items():
        trainable = {name: p for name, p in parameters.items() if p.requires_grad}
        for suffix, weight_decay, undecayed in (("", training_cfg.weight_decay, False), ("_no_decay", 0.0, True)):
            chosen = [p for name, p in trainable.items() if _is_undecayed(name, p) == undecayed]
            if chosen:
                rate = rates.get(part, training_cfg.learning_rate)
                groups.append({"name": part + suffix, "params": chosen, "lr": rate, "weight_decay": weight_decay})
    return groups


def _is_undecayed(name: str, parameter: nn.Parameter) -> bool:
    return name.endswith(".bias") or len(getattr(parameter, "ds_shape", parameter.shape)) < 2


def render_parameter_groups(groups: Sequence[Mapping[str, Any]]) -> str:
    """One line a group: name, tensors, parameters (also where ZeRO-3 has partitioned them), learning rate."""
    lines = []
    for group in groups:
        count = sum(getattr(p, "ds_numel", p.numel()) for p in group["params"])
        lines.append(
            f"{group['name']:<22} {len(group['params']):>5} tensors {count:>14,} parameters  "
            f"lr {group['lr']:g}  weight decay {group['weight_decay']:g}"
        )
    return "\n".join(lines)
