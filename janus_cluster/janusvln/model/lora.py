"""Low-rank adapters on the language model (peft), and the way back: weights as if there had never been any.

An adapted layer computes W·x + (alpha / rank)·B·A·x. A is random, B starts at zero, so nothing changes before the first
step. The adapters are put into the network itself, which stays a JanusModel with the same forward.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor

from janus_cluster.errors import UsageError
from janus_cluster.janusvln.model.janus import JanusModel
from janus_cluster.job.schema import LANGUAGE_LINEAR_LAYERS, Lora

ADAPTER = "default"
_A, _B, _BASE = f".lora_A.{ADAPTER}.weight", f".lora_B.{ADAPTER}.weight", ".base_layer."


def is_adapter(name: str) -> bool:
    """True for the name of an adapter's own weight."""
    return name.endswith((_A, _B))


def add_adapters(model: JanusModel, lora: Lora, *, seed: int) -> None:
    """Each of lora.target_modules in every language layer has an adapter, the same on every rank for the same seed.

    Raises: UsageError if a target is no linear layer of the language model.
    """
    unknown = [name for name in lora.target_modules if name not in LANGUAGE_LINEAR_LAYERS]
    if unknown or not lora.target_modules:
        raise UsageError(
            f"training.lora.target_modules: {', '.join(unknown) or 'empty'}; "
            f"allowed: {', '.join(LANGUAGE_LINEAR_LAYERS)}"
        )
    config = LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=list(lora.target_modules)
    )
    dtype = model.lm_head.weight.dtype
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model.model.language_model, adapter_name=ADAPTER)
    for name, parameter in model.named_parameters():
        if is_adapter(name):
            parameter.data = parameter.data.to(dtype)


def merge_adapters(state_dict: Mapping[str, Tensor], lora: Lora) -> dict[str, Tensor]:
    """The whole state dict of a model with adapters as that of a model without: W + (alpha / rank)·B·A, in W's dtype.

    The product is formed in fp32. A state dict without adapters comes back as it is.
    """
    scale = lora.alpha / lora.rank
    merged: dict[str, Tensor] = {}
    for name, tensor in state_dict.items():
        if is_adapter(name):
            continue
        plain = name.replace(_BASE, ".")
        layer = plain.removesuffix(".weight")
        if plain != name and plain.endswith(".weight") and layer + _A in state_dict:
            update = state_dict[layer + _B].float() @ state_dict[layer + _A].float()
            tensor = (tensor.float() + scale * update.to(tensor.device)).to(tensor.dtype)  # noqa: PLW2901
        merged[plain] = tensor
    return merged
