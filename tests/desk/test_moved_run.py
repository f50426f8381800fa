"""A run folder that was moved or renamed, and a job that was cancelled before it began. Slurm is scripts on PATH."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fake_site import UNKNOWN, Site

from janus_cluster.desk.cancel import estimate_loss
from janus_cluster.observe.status import load_earlier
from janus_cluster.run.paths import RunDir
from janus_cluster.run.records.attempt import AttemptRecord
from janus_cluster.run.records.failure import FailureRecord
from janus_cluster.run.records.submission import StatusRecord, SubmissionRecord

pytestmark = pytest.mark.slow


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


@pytest.fixture
def run(site: Site) -> RunDir:
    site.script("sbatch", "echo Submitted batch job 4711")
    done = site.janus("submit", "demo")
    assert done.returncode == 0, done.stderr
    return site.runs()[0]


def test_a_moved_run_is_resumed_with_paths_of_its_new_place(site: Site, run: RunDir, tmp_path: Path) -> None:
    StatusRecord(state="FAILED", cluster="slurm", job_id="4711", attempt=1).write(run.status_json)
    moved = RunDir(tmp_path / "elsewhere" / "renamed")
    moved.path.parent.mkdir()
    run.path.rename(moved.path)
    done = site.janus("resume", str(moved.path))
    assert done.returncode == 0, done.stderr
    assert f"moved here from {run.path}" in done.stdout
    sent = SubmissionRecord.load(moved.submission_json)
    assert sent is not None and sent.bundle == 2 and sent.script == moved.bundle(2).job_sbatch
    files = {path.name: path.read_text() for path in moved.bundle(2).path.iterdir() if path.name != "manifest.json"}
    assert not [name for name, text in files.items() if str(run.path) in text and name != "job.yaml"]
    assert not run.path.exists()


def test_a_run_that_a_link_leads_to_has_not_moved(site: Site, run: RunDir, tmp_path: Path) -> None:
    StatusRecord(state="FAILED", cluster="slurm", job_id="4711", attempt=1).write(run.status_json)
    (tmp_path / "link").symlink_to(run.path)
    done = site.janus("resume", str(tmp_path / "link"))
    assert done.returncode == 0 and "moved" not in done.stdout
    assert run.bundle_numbers() == [1]


def test_a_run_that_was_renamed_while_its_job_lives_is_not_sent_again(site: Site, run: RunDir) -> None:
    site.queue_holds_the_job()
    moved = RunDir(run.path.with_name("renamed"))
    run.path.rename(moved.path)
    done = site.janus("resume", str(moved.path))
    assert done.returncode == 2 and "is PENDING" in done.stderr
    assert len(site.calls("sbatch")) == 1


def test_a_job_cancelled_before_it_began_is_cancelled_after_slurm_has_forgotten_it(site: Site, run: RunDir) -> None:
    site.queue_holds_the_job()
    assert site.janus("cancel", str(run.path)).returncode == 0
    for program in ("squeue", "scontrol"):
        site.script(program, UNKNOWN)
    found = json.dumps(json.loads(site.janus("status", str(run.path), "--json").stdout))
    assert '"CANCELLED"' in found and "before it began" in found
    assert site.janus("resume", str(run.path)).returncode == 0


def test_work_of_an_earlier_job_is_not_lost_by_a_cancel(
    site: Site, run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in site.environ.items():
        monkeypatch.setenv(name, value)
    site.queue_holds_the_job()
    path = site.folder / "bin" / "squeue"
    path.write_text(path.read_text().replace("PENDING", "RUNNING"))
    earlier = StatusRecord(state="FAILED", cluster="slurm", job_id="4000", attempt=1, started_at=1.0)
    earlier.write(run.status_json)
    assert estimate_loss(run, now=100_000.0).minutes == 0


def test_the_history_names_the_failure_of_an_earlier_attempt(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    for kind, reason in (("exception", "training ended with exit code 1"), ("preflight", "preflight FAIL: n1")):
        number = run.begin_attempt()
        failure = FailureRecord(kind=kind, rank=3, node="n1", message="KeyError: x")
        AttemptRecord(
            attempt=number,
            from_step=0,
            started_at=0.0,
            state="FAILED",
            exit_code=12,
            reason=reason,
            ended_at=1.0,
            failure=failure,
        ).write(run.attempt_json(number))
    first, second = load_earlier(run, 3)
    assert "a rank raised an error: rank 3 on n1: KeyError: x" in first
    assert "preflight FAIL: n1" in second
