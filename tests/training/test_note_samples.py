"""A run remembers which samples it draws from, and warns where it continues with others."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from data_files import write_episodes

from janus_cluster.janusvln.data.index import SampleSplit, load_samples
from janus_cluster.job.schema import Data
from janus_cluster.run.files import read_json
from janus_cluster.run.paths import RunDir
from janus_cluster.training.batches import note_samples

pytestmark = pytest.mark.train


def load(root: Path) -> SampleSplit:
    return load_samples(Data(roots=[str(root)], validation_fraction=0), seed=0)


def test_a_run_that_goes_on_with_other_samples_reports_it(tmp_path: Path) -> None:
    root, run = write_episodes(tmp_path / "data"), RunDir(tmp_path / "run")
    run.path.mkdir()
    assert note_samples(run, load(root), resumes=False) is None
    assert note_samples(run, load(root), resumes=True) is None, "the same data, read anew"
    write_episodes(root, episodes=4)
    output = note_samples(run, load(root), resumes=True)
    assert output is not None and "12 samples then, 16 now" in output
    assert "--set restart.accept_changed_data=true" in output
    assert read_json(run.data_json)["num_samples"] == 16
    assert note_samples(run, load(root), resumes=True) == output, "the attempt that was warned may have died at once"
    assert note_samples(run, load(root), resumes=True, accepts_change=True) is None
    assert note_samples(run, load(root), resumes=True) is None, "what was accepted is what the run began with"


def test_data_that_are_as_they_were_again_need_no_acceptance(tmp_path: Path) -> None:
    root, run = write_episodes(tmp_path / "data"), RunDir(tmp_path / "run")
    run.path.mkdir()
    note_samples(run, load(root), resumes=False)
    (root / "ep_0").rename(tmp_path / "ep_0")
    assert note_samples(run, load(root), resumes=True) is not None
    (tmp_path / "ep_0").rename(root / "ep_0")
    assert note_samples(run, load(root), resumes=True) is None


def test_a_run_that_begins_anew_may_have_other_samples(tmp_path: Path) -> None:
    root, run = write_episodes(tmp_path / "data"), RunDir(tmp_path / "run")
    run.path.mkdir()
    note_samples(run, load(root), resumes=False)
    shutil.rmtree(root / "ep_0")
    assert note_samples(run, load(root), resumes=False) is None


def test_as_many_samples_of_another_cut_are_others(tmp_path: Path) -> None:
    first, second = (write_episodes(tmp_path / name, episodes=n, steps=s) for name, n, s in (("a", 3, 4), ("b", 4, 3)))
    assert len(load(first).train) == len(load(second).train) == 12
    assert load(first).train.fingerprint() != load(second).train.fingerprint()
    assert load(first).train.fingerprint() == load(first).train.fingerprint()
