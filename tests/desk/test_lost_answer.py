"""An answer of Slurm that was lost or not understood: no job is sent twice or forgotten, no folder of one is removed.

The Slurm programs are scripts on PATH.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from fake_site import LOST, SILENT, Site

from janus_cluster.desk.send import Prepared, hand_over
from janus_cluster.errors import MaybeQueued
from janus_cluster.job.load import load_job
from janus_cluster.job.resolve import resolve_job
from janus_cluster.job.resources import jobs_dir
from janus_cluster.run.bundle import render_bundles, run_written
from janus_cluster.run.manifest import collect_manifest
from janus_cluster.run.paths import RunDir
from janus_cluster.run.records.submission import StatusRecord, SubmissionRecord

pytestmark = pytest.mark.slow


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


@pytest.mark.parametrize("answer", [LOST, "kill -9 $$", r"printf '\377\376'", ":", "echo wrapper broke >&2; exit 3"])
def test_a_job_whose_answer_was_lost_is_found_in_the_queue(site: Site, answer: str) -> None:
    site.script("sbatch", answer)
    site.queue_holds_the_job()
    done = site.janus("submit", "demo")
    assert done.returncode == 0, done.stderr
    (run,) = site.runs()
    sent = SubmissionRecord.load(run.submission_json)
    assert sent is not None and sent.job_id == "4711"
    assert len(site.calls("sbatch")) == 1


@pytest.mark.parametrize(
    ("answer", "job_id", "cluster"),
    [
        ("echo 15786755", "15786755", ""),
        ("echo '15786755;beta'", "15786755", "beta"),
        ("echo 'Submitted batch job 7'; exit 1", "7", ""),
        (r"printf '\377\376\nSubmitted batch job 8 on cluster beta\n'", "8", "beta"),
    ],
)
def test_every_form_of_an_accepted_job_is_recorded(site: Site, answer: str, job_id: str, cluster: str) -> None:
    site.script("sbatch", answer)
    assert site.janus("submit", "demo").returncode == 0
    sent = SubmissionRecord.load(site.runs()[0].submission_json)
    assert sent is not None and (sent.job_id, sent.slurm_cluster) == (job_id, cluster)


def test_an_unclear_answer_of_a_job_that_the_queue_does_not_have_leaves_nothing(site: Site) -> None:
    site.script("sbatch", r"printf '\377\376' >&2; exit 1")
    site.script("squeue", ":")
    done = site.janus("submit", "demo")
    assert done.returncode == 2
    assert "the queue has no such job" in done.stderr
    assert site.runs() == []
    assert len(site.calls("squeue")) == 2


def test_a_request_that_may_still_arrive_is_kept_though_the_queue_has_no_such_job(site: Site) -> None:
    site.script("sbatch", LOST)
    site.script("squeue", ":")
    done = site.janus("submit", "demo")
    assert done.returncode == 21
    assert "may take the request later" in done.stderr and "Socket timed out" in done.stderr
    (run,) = site.runs()
    assert f"the job with {run.bundle(1).job_sbatch}" in done.stderr
    assert len(site.calls("sbatch")) == 1


@pytest.mark.parametrize(
    ("answer", "code", "advice"),
    [
        ("echo 'sbatch: error: QOSMaxSubmitJobPerUserLimit' >&2; exit 1", 25, "squeue --me"),
        ("echo 'sbatch: error: invalid account' >&2; exit 1", 2, "keys under `slurm:`"),
        ("echo \"sbatch: unrecognized option '--resources=x'\" >&2; exit 1", 2, "Slurm has that option from 25.11 on"),
        (
            "echo 'sbatch: error: Batch job submission failed: Unable to contact slurm controller (connect failure)' "
            ">&2; exit 1",
            21,
            "scontrol ping",
        ),
    ],
)
def test_a_refusal_names_the_remedy_of_its_kind(site: Site, answer: str, code: int, advice: str) -> None:
    site.script("sbatch", answer)
    done = site.janus("submit", "demo")
    assert (done.returncode, site.runs()) == (code, [])
    assert advice in done.stderr


def prepared_in(site: Site) -> Prepared:
    loaded = load_job(jobs_dir() / "demo.yaml", environ={})
    run = RunDir(site.folder / "home" / "runs" / "demo-1")
    resolved = resolve_job(
        loaded, run_dir=run.path, cluster="slurm", environ={}, cwd=site.folder, python=sys.executable
    )
    bundles = render_bundles(
        resolved, job_yaml_text="name: demo\n", secrets={}, manifest=collect_manifest(jobs_dir() / "demo.yaml", code={})
    )
    return Prepared(run=run, resolved=resolved, bundles=bundles, cluster="slurm", slurm_conf=None, patience_s=0)


@pytest.fixture
def maybe_queued(site: Site, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    """A run whose answer was lost while Slurm could not be asked."""
    for name, value in site.environ.items():
        monkeypatch.setenv(name, value)
    site.script("sbatch", LOST)
    site.script("squeue", SILENT)
    prepared = prepared_in(site)
    with pytest.raises(MaybeQueued) as caught:
        hand_over(prepared, run_written(prepared.run, prepared.bundles, code={}))
    assert "may be queued" in str(caught.value) and "squeue --me" in str(caught.value.hint)
    return prepared.run


def test_what_may_be_another_munge_key_is_named(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that 22.05 answers to one, whatever is asked."""
    for name, value in site.environ.items():
        monkeypatch.setenv(name, value)
    deaf = "echo 'slurm_load_jobs error: Zero Bytes were transmitted or received' >&2; exit 1"
    for program in ("sbatch", "squeue", "scontrol"):
        site.script(program, deaf)
    prepared = prepared_in(site)
    with pytest.raises(MaybeQueued) as caught:
        hand_over(prepared, run_written(prepared.run, prepared.bundles, code={}))
    assert "munge -n | ssh CONTROLLER unmunge" in str(caught.value.hint)
    assert prepared.run.path.is_dir()


def test_what_may_be_queued_keeps_its_folder_and_is_not_sent_again(site: Site, maybe_queued: RunDir) -> None:
    assert maybe_queued.bundle(1).job_sbatch.is_file()
    status = json.loads(site.janus("status", str(maybe_queued.path), "--json").stdout)
    assert "may be queued" in json.dumps(status)
    refused = site.janus("resume", str(maybe_queued.path))
    assert refused.returncode == 21
    assert len(site.calls("sbatch")) == 1


@pytest.mark.parametrize("command", [("cancel", "--yes"), ("resume",)])
def test_it_is_found_by_its_script_once_slurm_answers(
    site: Site, maybe_queued: RunDir, command: tuple[str, ...]
) -> None:
    site.queue_holds_the_job()
    done = site.janus(command[0], str(maybe_queued.path), *command[1:])
    sent = SubmissionRecord.load(maybe_queued.submission_json)
    assert sent is not None and sent.job_id == "4711"
    if command[0] == "cancel":
        assert done.returncode == 0 and site.calls("scancel") == ["scancel [] 4711"]
    else:
        assert done.returncode == 2 and "is PENDING" in done.stderr
    assert len(site.calls("sbatch")) == 1


def test_it_can_be_sent_again_once_slurm_has_no_such_job(site: Site, maybe_queued: RunDir) -> None:
    site.script("squeue", ":")
    site.script("sbatch", "echo Submitted batch job 9")
    done = site.janus("resume", str(maybe_queued.path))
    assert done.returncode == 0, done.stderr
    sent = SubmissionRecord.load(maybe_queued.submission_json)
    assert sent is not None and (sent.job_id, sent.history) == ("9", ())


def submitted_to_beta(site: Site) -> RunDir:
    site.script("sbatch", "echo Submitted batch job 4711 on cluster beta")
    assert site.janus("submit", "demo", SLURM_CLUSTERS="beta").returncode == 0
    (run,) = site.runs()
    return run


@pytest.mark.parametrize(
    "ask", [lambda run: ("status", str(run.path)), lambda run: ("resume", str(run.path)), lambda run: ("list",)]
)
def test_every_later_command_asks_the_cluster_that_has_the_job(
    site: Site, ask: Callable[[RunDir], tuple[str, ...]]
) -> None:
    run = submitted_to_beta(site)
    site.queue_holds_the_job()
    (site.folder / "calls").unlink()
    site.janus(*ask(run), SLURM_CLUSTERS="alpha")
    assert site.calls("squeue") and all(call.startswith("squeue [beta]") for call in site.calls("squeue"))


def test_a_resume_goes_to_the_cluster_of_the_run(site: Site) -> None:
    run = submitted_to_beta(site)
    StatusRecord(state="FAILED", cluster="slurm", job_id="4711", attempt=1).write(run.status_json)
    assert site.janus("resume", str(run.path)).returncode == 0
    assert [call[: len("sbatch [beta]")] for call in site.calls("sbatch")] == ["sbatch [beta]"] * 2


def test_a_fresh_status_is_not_overruled_by_a_queue_that_does_not_have_the_job(site: Site) -> None:
    run = submitted_to_beta(site)
    running = StatusRecord(
        state="RUNNING", cluster="slurm", job_id="4711", attempt=1, started_at=time.time(), updated_at=time.time()
    )
    running.write(run.status_json)
    found = json.loads(site.janus("status", str(run.path), "--json").stdout)
    assert "not confirmed" in json.dumps(found) and "FAILED" not in json.dumps(found)
    refused = site.janus("resume", str(run.path))
    assert refused.returncode == 21 and len(site.calls("sbatch")) == 1
    replace(running, updated_at=time.time() - 3600).write(run.status_json)
    assert "FAILED" in site.janus("status", str(run.path), "--json").stdout


def test_one_run_has_the_same_state_alone_and_among_others(site: Site) -> None:
    site.script("sbatch", "echo Submitted batch job 4711")
    for _ in range(2):
        assert site.janus("submit", "demo").returncode == 0
        site.script("sbatch", "echo Submitted batch job 4712")
    # A site's privacy rule keeps both out of squeue.
    site.script("squeue", ":")
    site.script(
        "scontrol",
        'printf "JobId=%s JobName=demo\\n   JobState=RUNNING Reason=None\\n   StartTime=1795233047\\n" "$last"',
    )
    alone = [json.loads(site.janus("status", str(run.path), "--json").stdout) for run in site.runs()]
    both = json.loads(site.janus("status", *(str(run.path) for run in site.runs()), "--json").stdout)
    assert "RUNNING" in json.dumps(alone[0])
    assert json.dumps(both).count('"RUNNING"') == json.dumps(alone).count('"RUNNING"')
