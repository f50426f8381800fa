"""Data of other machines and of neighbours: moved image roots, other spellings of actions, a part of a data set."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_files import annotation_records, four_part_records, write_episodes, write_json, write_r2r, write_scalevln

from janus_cluster.errors import UsageError
from janus_cluster.janusvln.data.desk import look_at_data
from janus_cluster.janusvln.data.formats.source import Source
from janus_cluster.janusvln.data.index import SampleSplit, draw_part, load_samples
from janus_cluster.job.load import load_job
from janus_cluster.job.schema import Data


def load(roots: Any, index_dir: Path | None = None, seed: int = 0, **keys: Any) -> SampleSplit:
    data = Data.model_validate({"roots": roots, "validation_fraction": 0, "max_bad_fraction": 0, **keys})
    return load_samples(data, seed=seed, index_dir=index_dir)


def moved_away(path: Path, here: Path, there: str) -> Path:
    """The file of records names its frames by their places on another machine."""
    path.write_text(path.read_text().replace(str(here), there))
    return path


@pytest.mark.parametrize("make", [four_part_records, annotation_records])
def test_frames_of_another_machine_are_read_from_image_roots(tmp_path, make):
    records = make(tmp_path)
    for record in records:
        record["images"] = [str(tmp_path / name) for name in record["images"]]
    here = load([str(write_json(tmp_path / "here.json", records))]).train
    path = moved_away(write_json(tmp_path / "data.json", records), tmp_path, "/mnt/alice/frames")
    with pytest.raises(UsageError, match="are elsewhere here") as caught:
        load([str(path)])
    assert "--set 'data.image_roots={/mnt/alice: /where}'" in str(caught.value)
    with pytest.raises(UsageError, match="are elsewhere here"):
        look_at_data(Data.model_validate({"roots": [str(path)]}))

    own = {"path": str(path), "image_roots": {"/mnt/alice/frames": str(tmp_path)}}
    assert len(load([own], image_roots={"/mnt/alice/frames": "/nowhere"}).train) == 6
    split = load([str(path)], image_roots={"/mnt": "/nowhere", "/mnt/alice/frames/": str(tmp_path)})
    assert [sample.frames for sample in split.train] == [sample.frames for sample in here]


def test_a_data_path_and_a_video_are_moved_too(tmp_path):
    records = four_part_records(tmp_path)
    for record in records:
        record["data_path"] = "/old/root"
    path = write_json(tmp_path / "data.json", records)
    assert len(load([str(path)], image_roots={"/old/root": str(tmp_path)}).train) == 6
    root = write_scalevln(tmp_path / "scale")
    records = json.loads((root / "annotations.json").read_text())
    for record in records:
        record["video"] = f"/old/root/{record['video']}"
    write_json(root / "annotations.json", records)
    assert len(load([str(root)], image_roots={"/old/root": str(root)}).train) == 12


def test_only_whole_names_of_folders_are_moved(tmp_path):
    source = Source(path=tmp_path, format="json", image_roots={"/a/b": "/x", "/a": "/y", "img": "/z"})
    moved = {"/a/b/1.png": "/x/1.png", "/a/bc/1.png": "/y/bc/1.png", "/ab/1.png": "/ab/1.png", "img/1.png": "/z/1.png"}
    assert {path: source.moved(path) for path in moved} == moved


def respell(root: Path) -> list[Any]:
    """Every format with actions of its own: the roots of a job."""
    roots: list[Any] = []
    records = four_part_records(root / "json")
    for record in records:
        record["action"] = "<go forward>"
    roots.append(str(write_json(root / "json" / "data.json", records)))
    records = annotation_records(root / "annotation")
    for record in records:
        record["conversations"][1]["value"] = "↑"
    roots.append(str(write_json(root / "annotation" / "data.json", records)))
    for write in (write_episodes, write_r2r):
        folder = write(root / write.__name__)
        for path in sorted(folder.rglob("step_*")):
            number = path.name.split("_")[1]
            path.rename(path.with_name(f"step_{number}_Forward{path.suffix}"))
        roots.append(str(folder))
    return roots


def test_spellings_of_actions_are_taken_from_the_jobs_table_in_every_format(tmp_path):
    roots = respell(tmp_path)
    for root in roots:
        with pytest.raises(UsageError, match="unknown actions") as caught:
            load([root])
        assert ": MOVE_FORWARD}'" in str(caught.value)
    table = {"<GO forward>": "MOVE_FORWARD", "↑": "MOVE_FORWARD", "FORWARD": "MOVE_FORWARD"}
    split = load(roots, actions=table)
    assert len(split.train) == 6 + 6 + 12 + 12 and {sample.action for sample in split.train} == {1}


def test_a_printed_table_is_what_the_job_takes(tmp_path):
    records = four_part_records(tmp_path)
    for record, action in zip(
        records, ("turn left 15", "it's right", "<stop>", "4", "FORWARD", "FORWARD"), strict=True
    ):
        record["action"] = action
    path = write_json(tmp_path / "data.json", records)
    with pytest.raises(UsageError, match="unknown actions") as caught:
        load([str(path)])
    (line,) = [line for line in str(caught.value).splitlines() if "unknown actions" in line]
    assert "FORWARD 2" in line and '"4": …' in line
    job = tmp_path / "job.yaml"
    job.write_text("name: x\n")
    words = shlex.split(line[line.index("--set") :].replace("…", "STOP"))
    data = load_job(job, sets=[words[1]], environ={}).config.data
    assert [sample.action for sample in load([str(path)], actions=data.actions).train] == [2, 3, 0, 0, 1, 1]


def test_a_roots_own_spellings_stand_before_the_jobs_and_renumber_actions(tmp_path):
    records = four_part_records(tmp_path)
    for record in records:
        record["action"] = 1
    path = str(write_json(tmp_path / "data.json", records))
    other = {"path": path, "actions": {"1": "TURN_LEFT"}}
    split = load([path, other], index_dir=tmp_path / "index")
    assert sorted(sample.action for sample in split.train) == [1] * 6 + [2] * 6


def test_two_meanings_of_one_spelling_are_refused(tmp_path):
    job = tmp_path / "job.yaml"
    job.write_text("name: x\ndata: {actions: {go: MOVE_FORWARD, GO: STOP}}\n")
    with pytest.raises(UsageError, match="'GO' is given two meanings"):
        load_job(job, environ={})


def test_a_fraction_draws_samples_by_the_seed_and_of_that_root_alone(tmp_path):
    root = str(write_episodes(tmp_path / "a", episodes=10))
    other = str(write_episodes(tmp_path / "b", prefix="other"))
    roots = [{"path": root, "fraction": 0.25}, other]
    drawn, again, others = (
        [sample.id for sample in load(roots, index_dir=tmp_path / "index", seed=seed).train] for seed in (0, 0, 1)
    )
    assert drawn == again != others
    assert sum(id.startswith("ep_") for id in drawn) == 10 and sum(id.startswith("other") for id in drawn) == 12
    assert draw_part(np.arange(3), 0.01, seed=0, root=0).shape == (1,)


def test_upstreams_name_with_a_percentage_is_answered_with_what_to_write(tmp_path):
    root = write_episodes(tmp_path / "a")
    with pytest.raises(UsageError, match="does not exist") as caught:
        load([f"{root}%50"])
    assert caught.value.hint == f"a part of a data set is {{path: {root}, fraction: 0.5}}"
