"""The newest whole checkpoint as the login node sees it: by sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from janus_cluster.run.checkpoints import find_newest_checkpoint
from janus_cluster.run.files import write_json_atomically
from janus_cluster.run.paths import RunDir

WEIGHTS = {"weights": {"bytes": 4, "sha256": "0" * 64}}


def manifest_of(step: int, **values: Any) -> dict[str, Any]:
    return {"schema_version": 2, "step": step, "zero_stage": 3, "files": WEIGHTS} | values


def make_checkpoint(run: RunDir, name: str, manifest: dict[str, Any] | None, *, data: bytes = b"1234") -> None:
    folder = run.checkpoints / name
    folder.mkdir(parents=True)
    (folder / "weights").write_bytes(data)
    if manifest is not None:
        write_json_atomically(folder / "manifest.json", manifest)


def test_the_newest_whole_one_is_found_and_others_are_passed_over(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    make_checkpoint(run, "checkpoint-9", manifest_of(9))
    make_checkpoint(run, "checkpoint-10", manifest_of(10))
    make_checkpoint(run, "checkpoint-11", manifest_of(11), data=b"123")
    make_checkpoint(run, "checkpoint-12", None)
    make_checkpoint(run, "checkpoint-13", manifest_of(13, files={"weights": 4}))
    make_checkpoint(run, "checkpoint-14.broken", manifest_of(14))
    make_checkpoint(run, ".partial/checkpoint-15-abc/checkpoint-15", manifest_of(15))
    make_checkpoint(run, "checkpoint-16", manifest_of(15))
    make_checkpoint(run, "checkpoint-17", manifest_of(17, schema_version=1))
    found = find_newest_checkpoint(run)
    assert found is not None and (found.step, found.path) == (10, run.checkpoints / "checkpoint-10")


def test_a_run_without_checkpoints_has_none(tmp_path: Path) -> None:
    assert find_newest_checkpoint(RunDir(tmp_path)) is None
