"""The files of a report: a page, and its pictures beside it; each whole or as it was before."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from janus_cluster.report.history import History
from janus_cluster.report.page import render_page
from janus_cluster.report.pictures import Picture, draw_comparison, draw_pictures
from janus_cluster.run.files import write_bytes_atomically, write_text_atomically
from janus_cluster.run.paths import RunDir

_PICTURES = ("comparison", "loss", "accuracy", "speed", "ranks", "timeline")


def default_folder(runs: Sequence[RunDir], log: Path | None) -> Path:
    """Inside the first run; beside the log where there is only that. Two things have a folder of their own."""
    if not runs:
        assert log is not None
        return log.with_name(f"{log.name}.report")
    names = [run.name for run in runs[1:]] + ([log.name] if log else [])
    return runs[0].report.joinpath(*(f"with_{name}" for name in names))


def events_folder(folder: Path) -> Path:
    """Where a report keeps TensorBoard's event files, a folder for each run: what --logdir takes."""
    return folder / "tensorboard"


def write_report(histories: Sequence[History], folder: Path, *, made_at: float, tensorboard: bool = False) -> Path:
    """`folder` holds the page, whose path is returned, and the pictures. Raises: OSError, JanusError."""
    groups: list[tuple[str, list[Picture]]] = []
    if len(histories) == 2:
        groups.append(("", draw_comparison(*histories)))
    groups += [(h.name if len(histories) > 1 else "", draw_pictures(h)) for h in histories]
    page = render_page(histories, groups, made_at=made_at)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    for index, (_, pictures) in enumerate(groups):
        # With two runs the first group is that of both.
        prefix = "" if len(histories) == 1 or index == 0 else f"{index}."
        for picture in pictures:
            write_bytes_atomically(folder / f"{prefix}{picture.name}.png", picture.png, mode=0o600)
        _remove_others(folder, prefix, {p.name for p in pictures})
    written = folder / "index.html"
    write_text_atomically(written, page, mode=0o600)
    if tensorboard:
        from janus_cluster.report.tensorboard import write_events

        for index, history in enumerate(histories):
            name = re.sub(r"[^A-Za-z0-9._-]+", "_", history.name).lstrip(".") or f"run{index}"
            write_events(history, events_folder(folder) / name)
    return written


def _remove_others(folder: Path, prefix: str, names: set[str]) -> None:
    """Remove pictures of an earlier report that this one does not have."""
    for name in _PICTURES:
        if name not in names:
            (folder / f"{prefix}{name}.png").unlink(missing_ok=True)
