"""The least data that a job can be submitted with: one episode of two frames."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image


def write_tiny_data(root: Path) -> Path:
    """root/episode/ has two frames, their descriptions and the milestones. Returns: root."""
    folder = root / "episode"
    folder.mkdir(parents=True)
    for name in ("step_0000_MOVE_FORWARD", "step_0001_STOP"):
        Image.new("RGB", (56, 42)).save(folder / f"{name}.png")
        described = {"landmark_description": "A sofa.", "spatial_description": "2 m away."}
        (folder / f"{name}.json").write_text(json.dumps(described))
    milestones = {
        "instruction_text": "Go to the sofa.",
        "subinstructions": ["Go on.", "Stop."],
        "completion_checkpoints": [{"checkpoint_frame_index": 0}],
    }
    (folder / "milestones_result.json").write_text(json.dumps(milestones))
    return root
