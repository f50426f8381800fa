"""Keys of the walk that an episode belongs to. Episodes that share a key are of one walk, in any root or format.

trajectory 4332 in 17DRP5sb8fy     R2R and RxR: several instructions for one trajectory, in several languages
path 1f0c… in 17DRP5sb8fy          the same reference path, under any number
episode r2r 577 in 17DRP5sb8fy     DAgger's folders are named SCENE_DATASET_EPISODE: 17DRP5sb8fy_r2r_000577
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from janus_cluster.janusvln.data.samples import judge_text

TRAJECTORY_FIELDS = ("trajectory_id", "traj_id", "path_id")
SCENE_FIELDS = ("scene_id", "scan", "scan_id", "scene")
PATH_FIELDS = ("reference_path", "path")
TRAJECTORY = "trajectory"
NO_SCENE = "an unnamed scene"
# Of data sets that number their episodes anew, as folders of DAgger and ScaleVLN name them.
DATASETS = ("rxr", "r2r", "envdrop", "scalevln")
NAMED_EPISODE = re.compile(rf"^(?P<scene>.+)_(?P<dataset>{'|'.join(DATASETS)})_0*(?P<number>\d+)$", re.IGNORECASE)
METRES_DIGITS = 2  # of a position: renderings of one path agree to the centimetre


def walk_keys(record: Mapping[str, Any], *, names: Sequence[str] = (), dataset: str | None = None) -> list[str]:
    """The keys of a record and of the names of its episode and folders; none where nothing identifies its walk.

    `dataset`: which of DATASETS numbered the record's episode_id, where that is known.
    """
    scene = _scene(record)
    keys = []
    trajectory = next((n for field in TRAJECTORY_FIELDS if (n := _number_or_name(record.get(field)))), None)
    if trajectory is not None:
        keys.append(f"{TRAJECTORY} {trajectory} in {scene or NO_SCENE}")
    if positions := _positions(record):
        digest = hashlib.blake2b(json.dumps(positions).encode(), digest_size=8).hexdigest()
        keys.append(f"path {digest} in {scene or NO_SCENE}")
    episode = _number_or_name(record.get("episode_id"))
    if dataset is not None and scene is not None and episode is not None:
        keys.append(_episode_key(dataset, episode.lstrip("0"), scene))
    keys += [_episode_key(m["dataset"], m["number"], m["scene"]) for m in map(NAMED_EPISODE.match, names) if m]
    return list(dict.fromkeys(keys))


def folder_names(frame: Path) -> tuple[str, str]:
    """The names of a frame's folder and of the one above it: NAME of NAME/rgb/000.jpg is one of them."""
    return frame.parent.name, frame.parent.parent.name


def dataset_of(source: Path, record: Mapping[str, Any]) -> str:
    """Which of DATASETS a record with an episode_id belongs to: R2R's have no language."""
    instruction = record.get("instruction")
    if isinstance(instruction, Mapping) and "language" in instruction:
        return "rxr"
    return next((name for name in DATASETS if name in str(source).lower()), "r2r")


def _episode_key(dataset: str, number: str, scene: str) -> str:
    return f"episode {dataset.lower()} {number} in {scene}"


def _scene(record: Mapping[str, Any]) -> str | None:
    """17DRP5sb8fy of mp3d/17DRP5sb8fy/17DRP5sb8fy.glb, kfPV7w3FaU5 of hm3d/00000-kfPV7w3FaU5/kfPV7w3FaU5.basis.glb."""
    value = next((v for field in SCENE_FIELDS if (v := _number_or_name(record.get(field)))), None)
    if value is None:
        return None
    return re.sub(r"^\d{5}-", "", PurePosixPath(value).name.split(".")[0]) or None


def _number_or_name(value: object) -> str | None:
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, str) and value.strip() and "\n" not in value and judge_text(value) is None:
        return value.strip()
    return None


def _positions(record: Mapping[str, Any]) -> list[Any] | None:
    """The reference path, rounded; without one, start and goal. A path of viewpoints' names is kept as it is."""
    path = next((record[field] for field in PATH_FIELDS if isinstance(record.get(field), list)), None)
    if path is None:
        goals = record.get("goals")
        goal = goals[0] if isinstance(goals, list) and goals else None
        if isinstance(goal, Mapping) and goal.get("position") and record.get("start_position"):
            path = [record["start_position"], goal["position"]]
    if path is None or len(path) < 2:
        return None
    return [_rounded(position) for position in path]


def _rounded(position: object) -> object:
    if isinstance(position, list):
        return [_rounded(value) for value in position]
    # "+ 0.0": -0.0 is 0.0
    return round(float(position), METRES_DIGITS) + 0.0 if isinstance(position, (int, float)) else str(position)
