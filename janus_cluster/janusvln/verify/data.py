"""The data pipeline in compatibility mode against what the predecessor made of the same episodes."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from janus_cluster.janusvln.data.dataset import NavigationDataset, collate
from janus_cluster.janusvln.data.images import load_frame
from janus_cluster.janusvln.data.index import load_samples
from janus_cluster.janusvln.data.samples import Sample
from janus_cluster.janusvln.data.tokenizer import load_tokenizer, tokenizer_ids
from janus_cluster.janusvln.model import pixels
from janus_cluster.janusvln.model.janus import JanusModel
from janus_cluster.janusvln.model.presets import build_config
from janus_cluster.janusvln.verify.case import FIXED_TOLERANCES, Comparison, count_mismatches
from janus_cluster.job.schema import Data, Model, Root, SegmentWeights
from janus_cluster.modelspec.frames import qwen_grid

# Normalised pixels: one grey level divided by CLIP's smallest standard deviation.
NORMALISED_TOLERANCE = FIXED_TOLERANCES["pixels"] / 0.261
FIELDS = (
    "ids, labels", "loss weights", "segments", "positions", "grids and frame sizes",
)  # fmt: skip


def compare_data_pipeline(sidecar: Mapping[str, Any], folder: Path, *, name: str) -> Iterator[Comparison]:
    """Samples, texts, tokens, labels, weights, positions, pixels and batches of every run in the sidecar."""
    tokenizer = load_tokenizer(folder / "tokenizer")
    model = _positions_model(tokenizer)
    for run_name, run in sidecar["runs"].items():
        data = compat_data(sidecar, folder, history=run["max_history_images"])
        samples = load_samples(data, seed=0, pad_history=True).train
        case = f"{name}.{run_name}"
        yield count_mismatches(case, "samples, frames and texts", _count_sample_mismatches(samples, run, folder))
        if len(samples) == len(run["samples"]):
            weights = _segment_weights(sidecar)
            dataset = NavigationDataset(samples, tokenizer=tokenizer, data=data, segment_weights=weights)
            yield from _compare_encoded(case, dataset, run, model, tokenizer.pad_token_id)
    yield from _compare_pixels(name, sidecar, folder)


def compat_data(sidecar: Mapping[str, Any], folder: Path, *, history: int) -> Data:
    """The job's data section under `compat: predecessor`."""
    return Data(
        roots=[Root(path=str(folder / "episodes"))],
        history=history,
        image_mode="pad",
        validation_fraction=0,
        min_pixels=sidecar["min_pixels"],
        max_pixels=sidecar["max_pixels"],
        max_length=1_000_000,
        # The folder holds broken things on purpose; which samples remain is compared.
        on_bad="skip",
        max_bad_fraction=1.0,
    )


def _segment_weights(sidecar: Mapping[str, Any]) -> SegmentWeights:
    weights = sidecar["loss_weights_config"]
    return SegmentWeights(
        subinstruction=weights["subinstruction"],
        description_2d=weights["desc2d"],
        description_3d=weights["desc3d"],
        action=weights["action"],
    )


def _positions_model(tokenizer: Any) -> JanusModel:
    """A network without weights, for its positions; its token ids are the tokenizer's."""
    with torch.device("meta"):
        return JanusModel(build_config(Model(preset="tiny"), tokenizer_ids(tokenizer)))


def _count_sample_mismatches(samples: Sequence[Sample], run: Mapping[str, Any], folder: Path) -> int:
    """How many samples are not the reference's, in its order; a missing or surplus one counts."""
    root = folder / "episodes"
    wanted = [
        (s["id"], s["images"], s["instruction"], s["subinstruction"], s["desc_2d"], s["desc_3d"], s["action_label"])
        for s in run["samples"]
    ]
    found = [
        (
            s.id, [path.relative_to(root).as_posix() for path in s.frames], s.instruction, s.subinstruction,
            s.description_2d, s.description_3d, s.action,
        )
        for s in samples
    ]  # fmt: skip
    return sum(a != b for a, b in zip(found, wanted, strict=False)) + abs(len(found) - len(wanted))


def _compare_encoded(
    case: str, dataset: NavigationDataset, run: Mapping[str, Any], model: JanusModel, pad_token_id: int
) -> Iterator[Comparison]:
    wrong = dict.fromkeys(FIELDS, 0)
    first = run["collate"]["indices"]
    kept = {}
    for i, wanted in enumerate(run["samples"]):
        row = dataset[i]
        if i in first:
            kept[i] = row
        for field, equal in _judge_row(row, wanted, model).items():
            wrong[field] += not equal
    for field, count in wrong.items():
        yield count_mismatches(case, field, count)
    batch = collate([kept[i] for i in first], pad_token_id)
    yield count_mismatches(case, "padded batch", _count_batch_mismatches(batch, run["collate"], pad_token_id))


def _judge_row(row: Mapping[str, Any], wanted: Mapping[str, Any], model: JanusModel) -> dict[str, bool]:
    ids, start = row["input_ids"], wanted["first_label_position"]
    labels = torch.cat((torch.full((start,), -100), ids[start:]))
    return {
        "ids, labels": _runs(ids) == wanted["input_ids_rle"] and torch.equal(row["labels"], labels),
        "loss weights": _runs(row["loss_weights"]) == wanted["loss_weights_rle"],
        "segments": _runs(row["segment_ids"]) == wanted["segment_ids_rle"],
        "positions": _positions_equal(row, wanted, model),
        "grids and frame sizes": row["image_grid_thw"].tolist() == wanted["image_grid_thw"]
        and list(row["frames"].shape) == wanted["images_vggt"],
    }


def _positions_equal(row: Mapping[str, Any], wanted: Mapping[str, Any], model: JanusModel) -> bool:
    positions, _ = model.model.get_rope_index(
        row["input_ids"][None], row["mm_token_type_ids"][None], image_grid_thw=row["image_grid_thw"]
    )
    digest = hashlib.sha256(positions.to(torch.int64).contiguous().numpy().tobytes()).hexdigest()
    return [list(positions.shape), digest] == [wanted["position_ids_shape"], wanted["position_ids_sha256_int64"]]


def _count_batch_mismatches(batch: Mapping[str, Any], wanted: Mapping[str, Any], pad_token_id: int) -> int:
    """How many properties of the padded batch are not the reference's."""
    padded = batch["attention_mask"] == 0
    fills = {"labels": -100, "loss_weights": 0.0, "segment_ids": 0, "input_ids": pad_token_id}
    checks = [
        list(batch["input_ids"].shape) == wanted["input_ids_shape"],
        batch["attention_mask"].sum(1).tolist() == wanted["attention_mask_sums"],
        list(batch["image_grid_thw"].shape) == wanted["image_grid_thw_shape"],
        [list(frames.shape) for frames in batch["frames"]] == wanted["images_vggt_shapes"],
        batch["actions"].tolist() == wanted["action_label"],
        pad_token_id == wanted["pad_values"]["input_ids"],
        *(bool((batch[key][padded] == value).all()) for key, value in fills.items()),
    ]
    return checks.count(False)


def _compare_pixels(name: str, sidecar: Mapping[str, Any], folder: Path) -> Iterator[Comparison]:
    """Probed pixels of every frame, as VGGT and as Qwen get them; `inf` where a size or grid is another."""
    worst = {"pixels, VGGT": 0.0, "pixels, Qwen": 0.0, "pixels, mean": 0.0}
    data = compat_data(sidecar, folder, history=0)
    for path, wanted in sidecar["images"].items():
        frame = torch.from_numpy(load_frame(folder / "episodes" / path, data))
        grid = list(qwen_grid(frame.shape[2], frame.shape[1]))
        if list(frame.shape) != wanted["vggt"]["shape"] or grid != wanted["image_grid_thw"]:
            worst = dict.fromkeys(worst, math.inf)
            continue
        unit, patches = pixels.unit_frames(frame[None])[0], pixels.qwen_patches(frame[None])
        found = {
            "pixels, VGGT": _worst_probe(unit, wanted["vggt"]["probes_c_y_x_value"]),
            "pixels, Qwen": _worst_probe(patches, wanted["pixel_values"]["probes_row_col_value"]),
            "pixels, mean": abs(float(unit.double().mean()) - wanted["vggt"]["mean"]),
        }
        worst = {key: max(value, found[key]) for key, value in worst.items()}
    tolerances = {"pixels, Qwen": NORMALISED_TOLERANCE}
    for key, value in worst.items():
        tolerance = tolerances.get(key, FIXED_TOLERANCES["pixels"])
        yield Comparison(case=name, quantity=key, difference=value, tolerance=tolerance)


def _worst_probe(tensor: Tensor, probes: Sequence[Sequence[float]]) -> float:
    return max(abs(float(tensor[tuple(int(i) for i in at)]) - value) for *at, value in probes)


def _runs(values: Tensor) -> list[list[float]]:
    """[value, how often in a row], as the sidecar writes sequences."""
    return [[value, len(list(members))] for value, members in groupby(values.tolist())]
