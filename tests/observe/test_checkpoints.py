"""The newest whole checkpoint as the login node sees it: by sizes, under both manifests that there have been."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from janus_cluster.observe.checkpoints import find_newest_checkpoint
from janus_cluster.rundir import RunDir, write_json_atomically

SIZES = {"schema_version": 1, "files_bytes": {"weights": 4}}
HASHES = {"schema_version": 2, "zero_stage": 3, "files": {"weights": {"bytes": 4, "sha256": "0" * 64}}}


def make_checkpoint(run: RunDir, name: str, manifest: dict[str, Any] | None, *, data: bytes = b"1234") -> None:
    folder = run.checkpoints / name
    folder.mkdir(parents=True)
    (folder / "weights").write_bytes(data)
    if manifest is not None:
        write_json_atomically(folder / "manifest.json", manifest)


@pytest.mark.parametrize("manifest", [SIZES, HASHES])
def test_the_newest_whole_one_is_found_and_others_are_passed_over(tmp_path: Path, manifest: dict[str, Any]) -> None:
    run = RunDir(tmp_path)
    make_checkpoint(run, "checkpoint-9", manifest)
    make_checkpoint(run, "checkpoint-10", manifest)
    make_checkpoint(run, "checkpoint-11", manifest, data=b"123")
    make_checkpoint(run, "checkpoint-12", None)
    make_checkpoint(run, "checkpoint-13", {"schema_version": 2, "files": {"weights": 4}})
    make_checkpoint(run, "checkpoint-14.broken", manifest)
    make_checkpoint(run, ".partial/checkpoint-15-abc/checkpoint-15", manifest)
    found = find_newest_checkpoint(run)
    assert found is not None and (found.step, found.path) == (10, run.checkpoints / "checkpoint-10")


def test_a_run_without_checkpoints_has_none(tmp_path: Path) -> None:
    assert find_newest_checkpoint(RunDir(tmp_path)) is None
