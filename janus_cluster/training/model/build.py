"""A JanusModel as a job describes it: weights found and checked, VGGT attached, the trainable parts marked."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.modeling_utils import set_zero3_state
from transformers.utils import is_flash_attn_2_available

from janus_cluster.config.schema import Model, Training
from janus_cluster.errors import UsageError
from janus_cluster.training.model.checkpoint_files import (
    CheckpointProblem,
    StoredTensor,
    find_problems,
    read_tensor_index,
    read_tensors,
)
from janus_cluster.training.model.janus import OWN_PREFIXES, JanusConfig, JanusModel
from janus_cluster.training.model.presets import TokenizerIds, build_config
from janus_cluster.training.model.vggt import Aggregator, VggtConfig
from janus_cluster.training.model.vggt_weights import (
    PREFIX,
    expected_shapes,
    is_unneeded_block,
    load_vggt_state,
    vggt_state_dict,
)

VGGT_FILE = "vggt.safetensors"
VGGT_IN_JANUS_PREFIX = "vggt."
FAMILY_KEYS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")


def build_model(
    model_cfg: Model,
    training_cfg: Training,
    *,
    tokenizer_ids: TokenizerIds,
    device: torch.device | str,
    dtype: torch.dtype,
    seed: int,
) -> JanusModel:
    """The job's network in training mode, frozen where the job says so, VGGT attached on `device`.

    Weights come from model.path; `tiny` without a path is random from the seed, the same on every rank. Under ZeRO-3
    (TrainingArguments made before) a loaded model is partitioned at once; DeepSpeed moves it.
    Raises: UsageError on missing, misshapen or foreign weights, naming file and key.
    """
    if model_cfg.path is not None:
        model, aggregator = _load_model(model_cfg, tokenizer_ids=tokenizer_ids, device=device, dtype=dtype, seed=seed)
    elif model_cfg.preset == "tiny":
        model, aggregator = _random_model(model_cfg, tokenizer_ids, dtype=dtype, seed=seed)
        if model_cfg.vggt_path is not None:
            aggregator = load_vggt(Path(model_cfg.vggt_path), model.config.vggt, dtype=dtype)
    else:
        raise UsageError(f"model.path: preset {model_cfg.preset} needs weights", hint="--set model.path=/path/to/model")
    model.attach_vggt(aggregator.to(device))
    if not is_deepspeed_zero3_enabled():
        model.to(device)
    mark_trainable(model, training_cfg)
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


def _load_model(
    model_cfg: Model, *, tokenizer_ids: TokenizerIds, device: torch.device | str, dtype: torch.dtype, seed: int
) -> tuple[JanusModel, Aggregator]:
    folder = Path(str(model_cfg.path))
    config = _load_config(model_cfg, folder, tokenizer_ids)
    index = _index_of(folder, key="model.path")
    report = _check_weights(folder, index, config)
    with torch.random.fork_rng(devices=[]):
        # New modules (merger, action head) are drawn here; under ZeRO rank 0's values are broadcast.
        torch.manual_seed(seed)
        model = JanusModel.from_pretrained(
            folder, config=config, dtype=dtype, attn_implementation=_attention_kind(device), local_files_only=True
        )
    aggregator = _load_vggt_for(model_cfg, folder, index, config.vggt, dtype=dtype)
    print(f"model: {folder}: {report}", flush=True)
    return model, aggregator


def _attention_kind(device: torch.device | str) -> str:
    return "flash_attention_2" if torch.device(device).type == "cuda" and is_flash_attn_2_available() else "sdpa"


def _load_config(model_cfg: Model, folder: Path, ids: TokenizerIds) -> JanusConfig:
    """The folder's configuration with the job's λ and reference frame. Raises: UsageError if it is another network."""
    try:
        values, _ = JanusConfig.get_config_dict(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UsageError(f"model.path: {folder} has no readable config.json: {error}") from error
    if values.get("model_type") != JanusConfig.model_type:
        raise UsageError(
            f"model.path: {folder}/config.json: model_type is {values.get('model_type')!r}, not 'qwen2_5_vl'",
            hint="Qwen2.5-VL-3B/7B-Instruct, or a JanusVLN checkpoint made of one",
        )
    config: JanusConfig = JanusConfig.from_pretrained(folder, local_files_only=True)
    wanted = build_config(model_cfg)
    config.lam, config.reference_frame = model_cfg.lam, model_cfg.reference_frame
    if config.vggt_config is None:
        config.vggt_config = wanted.vggt_config
    problems = []
    if model_cfg.preset != "tiny":
        for key in FAMILY_KEYS:
            has, wants = getattr(config.text_config, key), getattr(wanted.text_config, key)
            if has != wants:
                problems.append(f"{folder}/config.json: {key} is {has}, preset {model_cfg.preset} has {wants}")
    for key in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"):
        if getattr(config, key) != getattr(ids, key):
            problems.append(
                f"{folder}/config.json: {key} is {getattr(config, key)}, the tokenizer says {getattr(ids, key)}"
            )
    if config.text_config.vocab_size < ids.vocab_size:
        problems.append(
            f"{folder}/config.json: vocab_size is {config.text_config.vocab_size}, the tokenizer has {ids.vocab_size}"
        )
    if problems:
        raise UsageError.of_many(problems, hint="model.path, model.preset and the tokenizer must belong together")
    return config


def _index_of(path: Path, *, key: str) -> dict[str, StoredTensor]:
    try:
        return read_tensor_index(path)
    except CheckpointProblem as error:
        raise UsageError(f"{key}: {error}") from error


def _name_in_model(name: str) -> str:
    name = re.sub(r"^visual\.", "model.visual.", name)
    return re.sub(r"^model\.(?!language_model\.|visual\.)", "model.language_model.", name)


def _name_on_disk(name: str) -> str:
    return name.replace("model.visual.", "visual.").replace("model.language_model.", "model.")


def _check_weights(folder: Path, index: Mapping[str, StoredTensor], config: JanusConfig) -> str:
    """A line on what is taken, new and ignored. Raises: UsageError if the checkpoint does not fill the network."""
    with torch.device("meta"), set_zero3_state():
        expected = {name: tuple(tensor.shape) for name, tensor in JanusModel(config).state_dict().items()}
    if config.tie_word_embeddings:
        expected.pop("lm_head.weight", None)
    stored = {_name_in_model(name): tensor for name, tensor in index.items()}
    # A merger or an action head may be new, but not in parts: half a module is a broken checkpoint.
    new = [p for p in OWN_PREFIXES if not any(name.startswith(p) for name in stored)]
    needed = {name: shape for name, shape in expected.items() if not name.startswith(tuple(new) or ("\0",))}
    problems = find_problems(stored, needed, where=folder, name_on_disk=_name_on_disk)
    if problems:
        raise UsageError.of_many(
            [f"model.path: {problem}" for problem in problems], hint="is the download complete, and the right size?"
        )
    ignored = sorted(name for name in stored if name not in expected)
    names = ", ".join(sorted({name.split(".")[0] + ".*" for name in ignored}))
    return (
        f"{len(needed)} tensors taken, {len(expected) - len(needed)} newly initialised ({', '.join(new) or 'none'}), "
        f"{len(ignored)} ignored" + (f" ({names})" if names else "")
    )


def _load_vggt_for(
    model_cfg: Model, folder: Path, index: Mapping[str, StoredTensor], config: VggtConfig, *, dtype: torch.dtype
) -> Aggregator:
    """VGGT from model.vggt_path, else from the checkpoint itself (`vggt.*`), else from the file beside it."""
    if model_cfg.vggt_path is not None:
        return load_vggt(Path(model_cfg.vggt_path), config, dtype=dtype)
    inside = {
        name.removeprefix(VGGT_IN_JANUS_PREFIX): tensor
        for name, tensor in index.items()
        if name.startswith(VGGT_IN_JANUS_PREFIX + PREFIX)
    }
    if inside:
        return _aggregator_from(inside, VGGT_IN_JANUS_PREFIX, folder, config, key="model.path", dtype=dtype)
    if (folder / VGGT_FILE).is_file():
        return load_vggt(folder / VGGT_FILE, config, dtype=dtype)
    raise UsageError(
        f"model.vggt_path is not set, and {folder} holds neither vggt.aggregator.* nor {VGGT_FILE}",
        hint="--set model.vggt_path=/path/to/VGGT-1B",
    )


def load_vggt(path: Path, config: VggtConfig, *, dtype: torch.dtype) -> Aggregator:
    """The frozen aggregator with the weights of `path` (VGGT-1B's names; its other heads are ignored).

    Raises: UsageError on missing or misshapen `aggregator.*`, naming file and key.
    """
    index = _index_of(path, key="model.vggt_path")
    return _aggregator_from(index, "", path, config, key="model.vggt_path", dtype=dtype)


def _aggregator_from(
    index: Mapping[str, StoredTensor],
    disk_prefix: str,
    where: Path,
    config: VggtConfig,
    *,
    key: str,
    dtype: torch.dtype,
) -> Aggregator:
    expected = expected_shapes(config)
    problems = find_problems(index, expected, where=where, name_on_disk=lambda name: disk_prefix + name)
    if problems:
        raise UsageError.of_many([f"{key}: {p}" for p in problems], hint="VGGT-1B: facebook/VGGT-1B, aggregator.*")
    spare = sum(is_unneeded_block(name, config) for name in index)
    on_disk = {disk_prefix + name: index[name] for name in expected}
    tensors = {name.removeprefix(disk_prefix): t.to(dtype) for name, t in read_tensors(on_disk, on_disk).items()}
    with torch.device("meta"):
        aggregator = Aggregator(config)
    load_vggt_state(aggregator, tensors)
    ignored = len(index) - len(expected)
    print(f"vggt: {where}: {len(expected)} tensors taken, {ignored} ignored ({spare} of the last blocks)", flush=True)
    return aggregator


def write_vggt(model: JanusModel, folder: str | Path) -> Path:
    """folder/vggt.safetensors holds the attached aggregator under VGGT-1B's names, so that an export stands alone."""
    path = Path(folder) / VGGT_FILE
    tensors = {name: t.detach().cpu().contiguous() for name, t in vggt_state_dict(model.vggt).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    return path


def load_exported(
    folder: str | Path, *, vggt_path: str | Path | None = None, device: torch.device | str, dtype: torch.dtype
) -> JanusModel:
    """An exported model on `device`, ready to be evaluated. VGGT comes from `vggt_path` or from the folder itself."""
    model = JanusModel.from_pretrained(folder, dtype=dtype, attn_implementation=_attention_kind(device))
    source = Path(vggt_path) if vggt_path is not None else Path(folder) / VGGT_FILE
    model.attach_vggt(load_vggt(source, model.config.vggt, dtype=dtype).to(device))
    model.to(device)
    return model.eval()  # type: ignore[no-any-return]


def mark_trainable(model: JanusModel, training_cfg: Training) -> None:
    """requires_grad is set on exactly the parts that training.tune names."""
    model.requires_grad_(False)
    for part, parameters in _parts(model).items():
        for parameter in parameters.values():
            parameter.requires_grad_(getattr(training_cfg.tune, part))


def _parts(model: nn.Module) -> dict[str, dict[str, nn.Parameter]]:
    """Every parameter, once, by the part of training.tune it belongs to (tied weights belong to the LLM)."""
    parts: dict[str, dict[str, nn.Parameter]] = {
        "llm": {}, "projector": {}, "vision": {}, "vggt_merger": {}, "action_head": {},
    }  # fmt: skip
    prefixes = (
        ("model.visual.merger.", "projector"),
        ("model.visual.", "vision"),
        ("merger.", "vggt_merger"),
        ("action_head.", "action_head"),
        ("", "llm"),
    )
    for name, parameter in model.named_parameters():
        part = next(part for prefix, part in prefixes if name.startswith(prefix))
        parts[part][name] = parameter
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
