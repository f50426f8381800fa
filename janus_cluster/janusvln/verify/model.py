"""The aggregator and the whole network against reference numbers, through build_model and the model's own methods."""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from janus_cluster.janusvln.loss import label_mask
from janus_cluster.janusvln.model import pixels
from janus_cluster.janusvln.model.build import build_model
from janus_cluster.janusvln.model.compile import compile_blocks
from janus_cluster.janusvln.model.janus import JanusModel, JanusOutput
from janus_cluster.janusvln.model.presets import TokenizerIds
from janus_cluster.janusvln.model.streaming import StreamingMemory
from janus_cluster.janusvln.model.vggt import Aggregator
from janus_cluster.janusvln.model.vggt_weights import load_vggt_state
from janus_cluster.janusvln.verify.case import Comparison, Setup, compare, count_mismatches
from janus_cluster.job.schema import Model, Training, Tune
from janus_cluster.modelspec.networks import VggtConfig
from janus_cluster.modelspec.weight_names import VGGT_PREFIX, name_in_model, name_on_disk

SEGMENTS = ("subinstruction", "2d", "3d", "action")
Tensors = dict[str, Tensor]


def compare_aggregator(sidecar: Mapping[str, Any], file: Path, setup: Setup) -> Iterator[Comparison]:
    """Every case of an aggregator file: features in one pass and streamed, DINOv2's tokens, every layer."""
    stored = load_file(file)
    config = _vggt_config(sidecar["config"])
    aggregator = Aggregator(config)
    load_vggt_state(aggregator, {name: t for name, t in stored.items() if name.startswith(VGGT_PREFIX)})
    aggregator.to(setup.device, setup.dtype)
    if setup.compiled:
        compile_blocks(aggregator)
    for case in sorted({name.split(".")[1] for name in stored if name.startswith("case.")}):
        prefix = f"case.{case}."
        tensors = {n.removeprefix(prefix): t.to(setup.device) for n, t in stored.items() if n.startswith(prefix)}
        yield from _compare_aggregator_case(f"{file.stem}.{case}", aggregator, tensors, setup)


def _compare_aggregator_case(case: str, aggregator: Aggregator, tensors: Tensors, setup: Setup) -> Iterator[Comparison]:
    frames = _unit(tensors["in.frames"])
    layers: dict[tuple[int, int], Tensor] = {}
    handles = [
        block.register_forward_hook(lambda _m, _i, out, key=(i, kind): layers.__setitem__(key, out[-1]))
        for kind, blocks in enumerate((aggregator.frame_blocks, aggregator.global_blocks))
        for i, block in enumerate(blocks)
    ]
    try:
        features = aggregator(frames)
    finally:
        for handle in handles:
            handle.remove()
    memory = StreamingMemory(aggregator)
    for frame in frames:
        streamed = memory.append(frame)
    actual = {
        "out.features": features.flatten(0, 1),
        "out.dino_patchtokens": aggregator.patch_tokens(frames)[-1],
        "out.layers": torch.stack([torch.cat((layers[i, 0], layers[i, 1]), -1) for i in range(len(layers) // 2)]),
    }
    for name in sorted(name for name in tensors if name.startswith("out.")):
        expected = tensors[name]
        if name == "out.layers":
            # The last layer is not computed: the memory is the one before it.
            expected = expected[: len(actual[name])]
        yield _compare_known(case, name, actual, expected, setup)
    yield compare(
        case, "features, frame by frame", streamed.flatten(0, 1), tensors["out.features"], kind="states", setup=setup
    )


def compare_model(
    sidecar: Mapping[str, Any], weights: Path, cases: Mapping[str, tuple[Mapping[str, Any], Path]], setup: Setup
) -> Iterator[Comparison]:
    """Every case of a whole network, loaded through build_model from a checkpoint folder in the published layout."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        write_checkpoint(Path(folder), sidecar, weights)
        model = build_model(
            Model(preset="tiny", path=folder),
            Training(tune=Tune(vision=True), gradient_checkpointing=False),
            tokenizer_ids=tokenizer_ids(sidecar["config"]),
            device=setup.device,
            dtype=setup.dtype,
            seed=0,
        )
    if setup.compiled:
        compile_blocks(model)
        compile_blocks(model.vggt)
    for name, (case, file) in cases.items():
        yield from _compare_model_case(name, model, case, load_file(file), setup)


def write_checkpoint(folder: Path, sidecar: Mapping[str, Any], weights: Path) -> None:
    """`folder` is a published checkpoint: config.json as 4.x wrote it, and the weights (a link)."""
    config, ids = sidecar["config"], sidecar["config"]["token_ids"]
    values = {
        "architectures": ["Qwen2_5_VLForConditionalGenerationForJanusVLN"],
        "model_type": "qwen2_5_vl",
        **config["text"],
        "bos_token_id": None,
        "eos_token_id": ids["im_end"],
        "pad_token_id": ids["pad_token_id_of_the_tokenizer"],
        **{key: ids[key] for key in ids if key.endswith("_token_id")},
        "vision_config": {"model_type": "qwen2_5_vl", **config["vision"]},
        "lam": config["janus"]["lam"],
        "reference_frame": config["janus"]["reference_frame"],
        "vggt_merger_hidden_dim": config["janus"]["vggt_merger_hidden_dim"],
        "action_head_hidden_dim": config["janus"]["action_head_hidden"],
        "num_actions": config["janus"]["num_actions"],
        "vggt_config": _vggt_config(config["vggt"]).to_dict(),
    }
    (folder / "config.json").write_text(json.dumps(values), encoding="utf-8")
    (folder / "model.safetensors").symlink_to(weights.resolve())


def tokenizer_ids(config: Mapping[str, Any]) -> TokenizerIds:
    """The ids that a sidecar's configuration names."""
    ids = config["token_ids"]
    return TokenizerIds(
        vocab_size=config["text"]["vocab_size"],
        image_token_id=ids["image_token_id"],
        video_token_id=ids["video_token_id"],
        vision_start_token_id=ids["vision_start_token_id"],
        vision_end_token_id=ids["vision_end_token_id"],
        pad_token_id=ids["pad_token_id_of_the_tokenizer"],
        eos_token_id=ids["im_end"],
    )


@dataclass(frozen=True, kw_only=True)
class _Batch:
    """A case's inputs on the device. `frames_uint8` is None where the frames are not exactly uint8 / 255."""

    text: Tensors
    targets: dict[str, Any]
    grid: Tensor
    frames: list[Tensor]
    frames_uint8: list[Tensor] | None
    pixel_values: Tensor


def _batch(tensors: Tensors, *, image_token_id: int, d: float) -> _Batch:
    frames = [tensors[f"in.images_vggt.{b}"] for b in range(len(tensors["in.input_ids"]))]
    frames_uint8 = [_as_uint8(f) for f in frames] if _are_uint8(frames) else None
    from_frames = None if frames_uint8 is None else torch.cat([pixels.qwen_patches(f) for f in frames_uint8])
    return _Batch(
        text={
            "input_ids": tensors["in.input_ids"],
            "attention_mask": tensors["in.attention_mask"],
            "mm_token_type_ids": (tensors["in.input_ids"] == image_token_id).long(),
        },
        targets={
            "labels": tensors["in.labels"],
            "loss_weights": tensors["in.loss_weights"],
            "segment_ids": tensors["in.segment_ids"],
            "actions": tensors["in.action_label"],
            "action_loss_weight": d,
        },
        grid=tensors["in.image_grid_thw"],
        frames=[_unit(f) for f in frames],
        frames_uint8=frames_uint8,
        pixel_values=tensors["in.pixel_values"] if from_frames is None else from_frames,
    )


def _compare_model_case(
    case: str, model: JanusModel, sidecar: Mapping[str, Any], stored: Tensors, setup: Setup
) -> Iterator[Comparison]:
    model.config.lam, model.config.reference_frame = sidecar["lam"], sidecar["reference_frame"]
    tensors = {name: tensor.to(setup.device) for name, tensor in stored.items() if not name.startswith("ref_bug.")}
    batch = _batch(tensors, image_token_id=model.config.image_token_id, d=sidecar["distill_loss_weight"])
    yield from _compare_inputs(case, model, batch, tensors)
    actual = _states(model, batch) | _losses(_forward(model, batch))
    model.zero_grad()
    actual["out.loss_total"].backward()  # type: ignore[no-untyped-call]
    actual |= _gradients(model, tensors)
    for name in sorted(name for name in tensors if name.startswith("out.")):
        # Values at padding are undefined.
        expected = tensors[name][batch.text["attention_mask"].bool()] if name == "out.logits" else tensors[name]
        if name in _FLAT and actual[name].numel() == expected.numel():
            actual[name] = actual[name].reshape(expected.shape)
        yield _compare_known(case, name, actual, expected, setup)
    norms = (sidecar.get("grad_norm_per_parameter") or {}).get("out")
    if norms:
        yield _compare_all_norms(case, model, norms, setup)


# The reference has samples, or groups of 2×2 patches, in a dimension of their own.
_FLAT = ("out.image_embeds_3d", "out.vggt_features_merge_order")


def _compare_inputs(case: str, model: JanusModel, batch: _Batch, tensors: Tensors) -> Iterator[Comparison]:
    """Qwen's patches from the frames, and the positions of the tokens."""
    if "in.pixel_values" in tensors:
        difference = float((batch.pixel_values - tensors["in.pixel_values"]).abs().max())
        yield Comparison(case=case, quantity="in.pixel_values", difference=difference, tolerance=1e-6)
    positions, _ = model.model.get_rope_index(
        batch.text["input_ids"],
        batch.text["mm_token_type_ids"],
        image_grid_thw=batch.grid,
        attention_mask=batch.text["attention_mask"],
    )
    real = batch.text["attention_mask"].bool().expand(3, -1, -1)
    yield count_mismatches(case, "in.position_ids", int((positions != tensors["in.position_ids"])[real].sum()))


def _states(model: JanusModel, batch: _Batch) -> Tensors:
    """Intermediate embeddings and logits of the network."""
    with torch.no_grad():
        embeds = model.model.get_image_features(batch.pixel_values, batch.grid, return_dict=True).pooler_output
        memories = [model.remember(f) for f in batch.frames]
        fused = model.encode_images(batch.pixel_values, batch.grid, batch.frames)
        hidden = model.hidden_states(fused, image_grid_thw=batch.grid, **batch.text)
        labels = batch.targets["labels"]
        label_logits = model.label_logits(hidden, labels)
        return {
            "out.image_embeds": torch.cat(embeds),
            "out.vggt_features_merge_order": torch.cat(memories),
            "out.image_embeds_3d": torch.cat(model.merge_memories(memories)),
            "out.image_embeds_fused": torch.cat(fused),
            "out.logits": model.lm_head(hidden[batch.text["attention_mask"].bool()]),
            "out.logits_at_labels": label_logits,
            "out.loss_model": F.cross_entropy(label_logits.float(), labels[:, 1:][label_mask(labels)]),
        }


def _forward(model: JanusModel, batch: _Batch) -> JanusOutput:
    """The training pass: whole where the frames are uint8, as the loader gives them; else its parts."""
    if batch.frames_uint8 is not None:
        return model(**batch.text, **batch.targets, frames=batch.frames_uint8, image_grid_thw=batch.grid)  # type: ignore[no-any-return]
    fused = model.encode_images(batch.pixel_values, batch.grid, batch.frames)
    hidden = model.hidden_states(fused, image_grid_thw=batch.grid, **batch.text)
    return model.judge_hidden(hidden, attention_mask=batch.text["attention_mask"], **batch.targets)


def _losses(output: JanusOutput) -> Tensors:
    values: dict[str, Any] = dict(output.items())
    segments = values["segment_loss_sum"] / values["segment_weight_sum"]
    return {
        "out.loss_total": values["loss"],
        "out.loss_text": values["text_loss"],
        "out.loss_action": values["action_loss"],
        "out.action_logits": values["action_logits"],
        **{f"out.loss_segment.{name}": value for name, value in zip(SEGMENTS, segments, strict=True)},
    }


def _gradients(model: JanusModel, tensors: Tensors) -> Tensors:
    """The gradients, and the norms of groups of them, that the file asks for."""
    found: Tensors = {}
    all_norms = {
        name_on_disk(name): p.grad.double().norm() for name, p in model.named_parameters() if p.grad is not None
    }
    for name in tensors:
        if name.startswith("out.grad."):
            found[name] = model.get_parameter(name_in_model(name.removeprefix("out.grad."))).grad
        elif name.startswith("out.grad_norm."):
            group = name.removeprefix("out.grad_norm.")
            members = [norm for key, norm in all_norms.items() if _is_in_group(key, group)]
            found[name] = torch.stack(members).norm() if members else torch.tensor(torch.nan)
    return found


def _is_in_group(name: str, group: str) -> bool:
    if group == "all":
        return True
    if group == "all_but_vision_tower":
        return not name.startswith("visual.") or name.startswith("visual.merger.")
    return name.startswith(group + ".")


def _compare_all_norms(case: str, model: JanusModel, norms: Mapping[str, float], setup: Setup) -> Comparison:
    """The worst gradient norm of all parameters; both sides have the same parameters."""
    found = {
        name_on_disk(name): p.grad.double().norm().cpu() for name, p in model.named_parameters() if p.grad is not None
    }
    actual = torch.stack([found[name] if name in found else torch.tensor(torch.nan) for name in norms])
    if len(found) != len(norms):
        actual = actual[:0]
    expected = torch.tensor(list(norms.values()), dtype=torch.float64)
    return compare(
        case, f"gradient norms, {len(norms)} parameters", actual, expected, kind="gradient norms", setup=setup
    )


def _compare_known(case: str, name: str, actual: Tensors, expected: Tensor, setup: Setup) -> Comparison:
    """A stored quantity that nothing here computes does not hold."""
    found = actual.get(name, torch.tensor(torch.nan))
    if name.startswith("out.grad_norm."):
        return compare(case, name, found, expected, kind="gradient norms", setup=setup)
    if name.startswith("out.grad."):
        return compare(case, name, found, expected, kind="gradients", setup=setup)
    if name.startswith("out.loss"):
        return compare(case, name, found, expected, kind="losses", setup=setup)
    if name == "out.action_logits":
        return compare(case, name, found, expected, kind="action logits", setup=setup)
    return compare(case, name, found, expected, kind="states", setup=setup)


def _vggt_config(values: Mapping[str, Any]) -> VggtConfig:
    """A sidecar's numbers; it calls the size of DINO's position table dino_img_size."""
    keys = ("embed_dim", "depth", "num_heads", "dino_depth", "dino_num_heads", "patch_size", "mlp_ratio")
    return VggtConfig(
        **{key: values[key] for key in keys},
        num_register_tokens=values["num_register_tokens"],
        dino_image_size=values["dino_img_size"],
        rope_base=float(values.get("rope_freq", 100)),
    )


def _are_uint8(frames: list[Tensor]) -> bool:
    """True if every frame is uint8, or exactly uint8 / 255."""
    return all(f.dtype == torch.uint8 or torch.equal(_as_uint8(f).float() / 255.0, f) for f in frames)


def _as_uint8(frames: Tensor) -> Tensor:
    return frames if frames.dtype == torch.uint8 else (frames * 255.0).round().to(torch.uint8)


def _unit(frames: Tensor) -> Tensor:
    return pixels.unit_frames(frames) if frames.dtype == torch.uint8 else frames
