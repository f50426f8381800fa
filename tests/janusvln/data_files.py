"""Small data sets of every format, for tests: real files, real images."""

from __future__ import annotations

import gzip
import io
import json
from pathlib import Path
from typing import Any

from PIL import Image

ACTIONS = ("MOVE_FORWARD", "TURN_LEFT", "TURN_RIGHT", "STOP")


def make_png(width: int, height: int, *, file_format: str = "PNG") -> bytes:
    """The bytes of an image that is not of one colour, so that cutting it cuts something."""
    image = Image.linear_gradient("L").resize((width, height)).convert("RGB")
    buffer = io.BytesIO()
    image.save(buffer, file_format)
    return buffer.getvalue()


FRAME = make_png(32, 24)
JPEG = make_png(32, 24, file_format="JPEG")


def write_json(path: Path, value: Any) -> Path:
    """The file, with its folder, holds the value; gzipped where its name ends so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = json.dumps(value).encode()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path


def write_frames(folder: Path, names: list[str], pixels: bytes = FRAME) -> list[Path]:
    """Write frames of these names into the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(pixels)
    return [folder / name for name in names]


def write_episodes(root: Path, *, episodes: int = 3, steps: int = 4, prefix: str = "ep") -> Path:
    """Episode folders."""
    for number in range(episodes):
        folder = root / f"{prefix}_{number}"
        names = [f"step_{i:04d}_{ACTIONS[min(i % 3, 3) if i < steps - 1 else 3]}" for i in range(steps)]
        write_frames(folder, [f"{name}.png" for name in names])
        for i, name in enumerate(names):
            described = {"landmark_description": f"A sofa {i}.", "spatial_description": f"{i} m away."}
            write_json(folder / f"{name}.json", described)
        milestones = {
            "instruction_text": f"Go to room {number}.",
            "subinstructions": ["Leave.", "Arrive."],
            "completion_checkpoints": [{"checkpoint_frame_index": 1}],
        }
        write_json(folder / "milestones_result.json", milestones)
    return root


def four_part_records(folder: Path, *, count: int = 6) -> list[dict[str, Any]]:
    """Records of the JSON format; their frames are in folder/frames."""
    write_frames(folder / "frames", [f"{i}.png" for i in range(count)])
    return [
        {
            "id": f"walk_{i // 3}/{i}",
            "instruction": "Go to the door.",
            "subinstruction": "Turn around.",
            "2D_description": f"A lamp {i}.",
            "3D_description": "2 m away.",
            "action": ACTIONS[i % 4],
            "images": [f"frames/{j}.png" for j in range(max(0, i - 2), i + 1)],
        }
        for i in range(count)
    ]


def annotation_records(folder: Path, *, count: int = 6) -> list[dict[str, Any]]:
    """Records of upstream's annotation; their frames are in folder/frames."""
    records = four_part_records(folder, count=count)
    return [
        {
            "id": record["id"],
            "images": record["images"],
            "conversations": [
                {
                    "from": "human",
                    "value": "Seen:" + "<image>" * (len(record["images"]) - 1) + "\n Now:<image>\n Go to the door.",
                },
                {"from": "gpt", "value": record["action"]},
            ],
        }
        for record in records
    ]


def write_r2r(folder: Path, *, episodes: int = 3, steps: int = 4) -> Path:
    """train.json.gz and a folder of frames for each episode."""
    records = []
    for number in range(episodes):
        actions = [*ACTIONS[: steps - 1], "STOP"]
        write_frames(folder / str(number), [f"step_{i}_{action}.png" for i, action in enumerate(actions)])
        records.append({"episode_id": number, "instruction": {"instruction_text": f" Go to room {number}. "}})
    write_json(folder / "train.json.gz", {"episodes": records})
    return folder


def write_scalevln(folder: Path, *, episodes: int = 3, steps: int = 4) -> Path:
    """annotations.json and images/NAME/rgb/000.jpg."""
    records = []
    for number in range(episodes):
        write_frames(folder / "images" / f"walk_{number}" / "rgb", [f"{i:03d}.jpg" for i in range(steps)], JPEG)
        actions = [-1, *[1 + i % 3 for i in range(steps - 1)], 0]
        record = {"id": 100 + number, "video": f"images/walk_{number}", "instructions": ["Go on."], "actions": actions}
        records.append(record)
    write_json(folder / "annotations.json", records)
    return folder
