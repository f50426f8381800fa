"""Recognise the content of a root that holds no episodes, so that the right path can be given."""

from __future__ import annotations

import gzip
import os
import zlib
from collections.abc import Sequence
from pathlib import Path

from janus_cluster.errors import UsageError
from janus_cluster.janusvln.data.formats.episodes import MILESTONES_NAME
from janus_cluster.janusvln.data.formats.source import PICTURE_SUFFIXES

RECORD_SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz")
FOLDERS_TRIED = 1_000  # of a root: a stat each
FOLDERS_OPENED = 20
NAMES_SHOWN = 5
HEAD_BYTES = 65_536


def require_episodes(root: Path) -> None:
    """Require that folders under the root are episodes, or that nothing else is recognised there.

    Raises: UsageError naming the content.
    """
    folders, files = _list(root)
    step = max(1, len(folders) // FOLDERS_TRIED)
    if any((root / name / MILESTONES_NAME).is_file() for name in folders[::step]):
        return
    if records := [name for name in files if _holds_records(root / name)]:
        raise _named(root, records)
    for name in folders[:FOLDERS_OPENED]:
        _refuse_inner(root, name)


def _refuse_inner(root: Path, name: str) -> None:
    """Raises: UsageError where the folder of that name shows what the root is."""
    folders, files = _list(root / name)
    if records := [f"{name}/{file}" for file in files if _holds_records(root / name / file)]:
        raise _named(root, records)
    if any((root / name / inner / MILESTONES_NAME).is_file() for inner in folders[:FOLDERS_OPENED]):
        raise UsageError(
            f"data.roots: {root} holds no episodes ({MILESTONES_NAME}), its folder {name} does: give its path",
            hint=f"--set 'data.roots=[{root / name}]'",
        )
    if any(_is_description(file) for file in files):
        return  # an episode without its milestones, which is listed as such
    frames = [file for file in files if file.rpartition(".")[2].lower() in PICTURE_SUFFIXES]
    if frames or "rgb" in folders:
        shown = f"{name}/{frames[0]}" if frames else f"{name}/rgb"
        raise UsageError(
            f"data.roots: {root} holds frames ({shown}) but neither episodes ({MILESTONES_NAME}) nor a file of records",
            hint="give the file of records as path and this folder as images: "
            f"--set 'data.roots=[{{path: /path/to/train.json.gz, images: {root}}}]'",
        )


def _holds_records(path: Path) -> bool:
    """Whether a file begins as a list of records does; a configuration is an object without "episodes"."""
    if not path.name.endswith(RECORD_SUFFIXES) or _is_description(path.name):
        return False
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            head = file.read(HEAD_BYTES).lstrip(b"\xef\xbb\xbf \t\r\n")
    except (OSError, EOFError, zlib.error):
        return False
    return head.startswith(b"[") or b'"episodes"' in head or (head.startswith(b"{") and ".jsonl" in path.suffixes)


def _is_description(file: str) -> bool:
    """step_0006_TURN_LEFT.json describes the frame beside it."""
    return file.startswith("step_") and file.endswith(".json")


def _named(root: Path, records: Sequence[str]) -> UsageError:
    shown = ", ".join(records[:NAMES_SHOWN]) + (
        f" and {len(records) - NAMES_SHOWN} more" * (len(records) > NAMES_SHOWN)
    )
    one = len(records) == 1
    return UsageError(
        f"data.roots: {root} holds no episodes ({MILESTONES_NAME}); there {'is' if one else 'are'} {shown} in it: give "
        f"{'its path' if one else 'the path of one'}",
        hint=f"--set 'data.roots=[{root / records[0]}]'; with {{path: …, images: …}} where its frames are elsewhere",
    )


def _list(folder: Path) -> tuple[list[str], list[str]]:
    """Names of folders and of files, sorted; hidden ones are left out. Unreadable folders hold nothing."""
    try:
        with os.scandir(folder) as entries:
            found = [(entry.name, entry.is_dir()) for entry in entries]
    except OSError:
        return [], []
    shown = sorted((name, is_dir) for name, is_dir in found if not name.startswith("."))
    return [name for name, is_dir in shown if is_dir], [name for name, is_dir in shown if not is_dir]
