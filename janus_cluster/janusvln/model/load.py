"""Weights on disk -> the network: found, judged by their headers, taken. Nothing is filled with noise silently."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import save_file
from torch import Tensor
from transformers.modeling_utils import set_zero3_state
from transformers.utils import is_flash_attn_2_available

from janus_cluster.errors import UsageError
from janus_cluster.janusvln.model.attention import use_kernels_of_any_length
from janus_cluster.janusvln.model.checkpoint_files import read_tensors
from janus_cluster.janusvln.model.janus import JanusConfig, JanusModel
from janus_cluster.janusvln.model.presets import TokenizerIds
from janus_cluster.janusvln.model.vggt import Aggregator
from janus_cluster.janusvln.model.vggt_weights import load_vggt_state, vggt_state_dict
from janus_cluster.job.schema import Model
from janus_cluster.modelspec.check_weights import (
    check_family,
    judge_model_weights,
    judge_vggt_weights,
    load_config_values,
    note_on_head,
    read_model_index,
)
from janus_cluster.modelspec.networks import PRESETS, VggtConfig
from janus_cluster.modelspec.safetensors_header import render_names
from janus_cluster.modelspec.vggt_source import VGGT_FILE, VggtSource, find_vggt, find_vggt_of
from janus_cluster.modelspec.weight_names import Shapes, vggt_shapes


def load_model(
    model_cfg: Model, *, tokenizer_ids: TokenizerIds, device: torch.device | str, dtype: torch.dtype, seed: int
) -> tuple[JanusModel, Aggregator]:
    """The network and the aggregator of model.path; what was taken, drawn anew and ignored is printed.

    Raises: UsageError on missing, misshapen or foreign weights, naming file and key.
    """
    folder = Path(str(model_cfg.path))
    config = _load_config(model_cfg, folder, tokenizer_ids)
    index = read_model_index(folder)
    report = judge_model_weights(index, model_shapes(config), where=folder)
    with torch.random.fork_rng(devices=[]):
        # New modules (merger, action head) are drawn here; under ZeRO rank 0's values are broadcast.
        torch.manual_seed(seed)
        model = JanusModel.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            attn_implementation=_attention_kind(device, dtype),
            local_files_only=True,
        )
    require_finite(model.named_parameters(), where=f"model.path: {folder}")
    vggt = find_vggt_of(model_cfg, index)
    assert vggt is not None
    aggregator = _aggregator_from(vggt, config.vggt, device=device, dtype=dtype)
    print("\n".join([f"model: {folder}: {report}", *note_on_head(folder)]), flush=True)
    return model, aggregator


def model_shapes(config: JanusConfig) -> Shapes:
    """Name and shape of every weight that a checkpoint of this configuration must fill, from the network itself."""
    with torch.device("meta"), set_zero3_state():
        shapes = {name: tuple(tensor.shape) for name, tensor in JanusModel(config).state_dict().items()}
    if config.tie_word_embeddings:
        shapes.pop("lm_head.weight", None)
    return shapes


def load_vggt(path: Path, config: VggtConfig, *, device: torch.device | str, dtype: torch.dtype) -> Aggregator:
    """The frozen aggregator on `device`, with VGGT's weights in `path`; its other heads are ignored.

    Raises: UsageError on missing or misshapen `aggregator.*`, naming file and key.
    """
    return _aggregator_from(find_vggt(path, key="model.vggt_path"), config, device=device, dtype=dtype)


def load_exported(
    folder: str | Path, *, vggt_path: str | Path | None = None, device: torch.device | str, dtype: torch.dtype
) -> JanusModel:
    """An exported model on `device`, ready to be evaluated. VGGT comes from `vggt_path` or from the folder itself.

    Raises: UsageError if it is in neither, or weights are missing or misshapen.
    """
    use_kernels_of_any_length()
    model = JanusModel.from_pretrained(folder, dtype=dtype, attn_implementation=_attention_kind(device, dtype))
    require_finite(model.named_parameters(), where=str(folder))
    source = find_vggt(Path(folder if vggt_path is None else vggt_path), key="model" if vggt_path is None else "VGGT")
    model.attach_vggt(_aggregator_from(source, model.config.vggt, device=device, dtype=dtype))
    model.to(device)
    return model.eval()  # type: ignore[no-any-return]


def write_vggt(model: JanusModel, folder: str | Path) -> Path:
    """Write the attached aggregator to folder/vggt.safetensors under VGGT-1B's names: the export is self-contained."""
    path = Path(folder) / VGGT_FILE
    save_file(vggt_tensors(model), path, metadata={"format": "pt"})
    return path


def vggt_tensors(model: JanusModel) -> dict[str, Tensor]:
    """The attached aggregator's tensors under VGGT-1B's names, on the CPU."""
    return {name: t.detach().cpu().contiguous() for name, t in vggt_state_dict(model.vggt).items()}


def _attention_kind(device: torch.device | str, dtype: torch.dtype) -> str:
    """Flash attention where it is installed and can compute: on a GPU, in 16 bits."""
    can_flash = torch.device(device).type == "cuda" and dtype in (torch.bfloat16, torch.float16)
    if not (can_flash and is_flash_attn_2_available()):
        return "sdpa"
    if (reason := why_not_importable("flash_attn")) is not None:
        print(f"model: flash-attn is installed, but not for this torch ({reason}): torch's own attention", flush=True)
        return "sdpa"
    return "flash_attention_2"


def why_not_importable(module: str) -> str | None:
    """The import's error, in a line; None where it succeeds. A library built for another torch has all its files."""
    try:
        importlib.import_module(module)
    except (ImportError, OSError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


def _load_config(model_cfg: Model, folder: Path, ids: TokenizerIds) -> JanusConfig:
    """The folder's configuration with the job's λ and reference frame. Raises: UsageError if it is another network."""
    values = load_config_values(folder)
    check_family(values, model_cfg, folder)
    try:
        config: JanusConfig = JanusConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, TypeError, AttributeError, StrictDataclassError) as error:
        raise UsageError(f"model.path: {folder}/config.json: {error}") from error
    config.lam, config.reference_frame = model_cfg.lam, model_cfg.reference_frame
    if config.vggt_config is None:
        config.vggt_config = PRESETS[model_cfg.preset].vggt.to_dict()
    problems = [
        f"{folder}/config.json: {key} is {getattr(config, key)}, in the tokenizer {getattr(ids, key)}"
        for key in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
        if getattr(config, key) != getattr(ids, key)
    ]
    if config.text_config.vocab_size < ids.vocab_size:
        problems.append(
            f"{folder}/config.json: vocab_size is {config.text_config.vocab_size}, the tokenizer has {ids.vocab_size}"
        )
    if problems:
        raise UsageError.of_many(problems, hint="model.path, model.preset and the tokenizer must belong together")
    return config


def require_finite(tensors: Iterable[tuple[str, torch.Tensor]], *, where: str) -> None:
    """Require that every value that this rank has of the tensors is a number. Raises: UsageError naming the others.

    Found before the first step: in a loss that is NaN, such weights look like too large a learning rate.
    """
    # Under ZeRO-3 a rank has its own part of a parameter.
    own = ((name, getattr(tensor, "ds_tensor", tensor).detach()) for name, tensor in tensors)
    spoilt = [name for name, t in own if t.device.type != "meta" and not bool(torch.isfinite(t).all())]
    if spoilt:
        raise UsageError(
            f"{where}: {len(spoilt)} tensors hold values that are not finite (NaN or infinite): {render_names(spoilt)}",
            hint="the weights themselves are spoilt: copy or download them again",
            kind="bad_weights",
        )


def _aggregator_from(
    source: VggtSource, config: VggtConfig, *, device: torch.device | str, dtype: torch.dtype
) -> Aggregator:
    report = judge_vggt_weights(source, config)
    on_disk = {source.prefix + name: source.tensors[name] for name in vggt_shapes(config)}
    # One by one to the device: the host holds one converted tensor at a time, not all of every rank's.
    tensors = {
        name.removeprefix(source.prefix): t.to(device=device, dtype=dtype)
        for name, t in read_tensors(on_disk, on_disk).items()
    }
    require_finite(tensors.items(), where=f"{source.key}: {source.path}")
    with torch.device("meta"):
        aggregator = Aggregator(config)
    load_vggt_state(aggregator, tensors)
    print(report, flush=True)
    return aggregator
