"""The files of an evaluation: evaluation.json, predictions.jsonl, and a page that shows samples with their pictures."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from janus_cluster.janusvln.predictions import Prediction
from janus_cluster.job.templates import template_environment
from janus_cluster.run.files import write_text_atomically
from janus_cluster.run.records.training import EvaluationRecord

EVALUATION_JSON = "evaluation.json"
PREDICTIONS_JSONL = "predictions.jsonl"
PREDICTIONS_HTML = "predictions.html"

# Nine frames of this width are 60 kB; fifty samples make a page of 3 MB.
THUMBNAIL_WIDTH = 224
JPEG_QUALITY = 75


@dataclass(frozen=True, kw_only=True, slots=True)
class ShownSample:
    """A prediction and its frames as `data:` addresses, the current one last."""

    prediction: Prediction
    pictures: tuple[str, ...]


def render_picture(frame_3HW: NDArray[np.uint8]) -> str:
    """A frame as a small JPEG in a `data:` address. Shapes: [3, H, W] uint8."""
    image = Image.fromarray(frame_3HW.transpose(1, 2, 0))
    image.thumbnail((THUMBNAIL_WIDTH, THUMBNAIL_WIDTH))
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=JPEG_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def render_page(title: str, summary: Sequence[str], samples: Sequence[ShownSample]) -> str:
    """One HTML page that needs no other file. Every text is escaped: instructions and answers may hold anything."""
    template = template_environment(Path(__file__).parent, is_html=True).get_template("predictions.html.j2")
    return _encodable(template.render(title=title, summary=summary, samples=samples))


def write_report(
    folder: Path, *, evaluation: Mapping[str, Any], predictions: Sequence[Prediction], page: str
) -> dict[str, Path]:
    """`folder` holds the three files, each whole or as it was before. Returns: their paths by kind."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {
        "evaluation": folder / EVALUATION_JSON,
        "predictions": folder / PREDICTIONS_JSONL,
        "page": folder / PREDICTIONS_HTML,
    }
    lines = [json.dumps(prediction.to_json(), ensure_ascii=False) + "\n" for prediction in predictions]
    write_text_atomically(paths["predictions"], _encodable("".join(lines)))
    write_text_atomically(paths["page"], page)
    EvaluationRecord(scores=evaluation).write(paths["evaluation"])
    return paths


def _encodable(text: str) -> str:
    """`text` with a \\udcXX for every byte of a file's name that is no UTF-8: JSON's own way to write it."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
