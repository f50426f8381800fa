"""Whatever the programs of Slurm answer: no job is sent twice, no folder of a live job removed, nothing made up.

The programs are answered where submitit and commands.py would start them. An answer is that of a small model of Slurm,
or it is lost, cut, late, or another program's. A squeue that exits with 0 and leaves out a job of the user's cannot be
distinguished from one that does not have it, so `squeue --me` does not
do that here.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import submitit.core.utils
from drawing import drawn
from hypothesis import given
from hypothesis import strategies as st

from janus_cluster.desk.cancel import cancel_run
from janus_cluster.desk.harvest import blamed_nodes
from janus_cluster.desk.resume import resume
from janus_cluster.desk.send import Prepared, hand_over
from janus_cluster.errors import JanusError
from janus_cluster.job.load import load_job
from janus_cluster.job.resolve import resolve_job
from janus_cluster.job.resources import jobs_dir
from janus_cluster.observe.status import add_card, collect_status
from janus_cluster.run.bundle import render_bundles, run_written
from janus_cluster.run.manifest import collect_manifest
from janus_cluster.run.paths import RunDir
from janus_cluster.run.records.submission import StatusRecord, SubmissionRecord
from janus_cluster.slurm import commands, submission
from janus_cluster.slurm.state import FINAL

UNKNOWN = "slurm_load_jobs error: Invalid job id specified"
MESSAGES = [
    "slurm_load_jobs error: Unable to contact slurm controller (connect failure)",
    "slurm_load_jobs error: Zero Bytes were transmitted or received",
    'error: Munge encode failed: Failed to access "/run/munge/munge.socket.2"',
    "slurm_load_jobs error: Protocol authentication error",
    "wrapper: \ufffd\ufffd",
    "",
]
LOST = [
    ("", "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation", 1),
    ("", "sbatch: error: Batch job submission failed: Zero Bytes were transmitted or received", 1),
    ("", "", 0),
    ("", "", 137),
    ("Submitted batch jo", "", 0),
    ("\ufffd\ufffd", "wrapper broke", 3),
]
REFUSED = [
    ("", "sbatch: error: Batch job submission failed: Invalid account", 1),
    ("", "sbatch: error: Batch job submission failed: Unable to contact slurm controller (connect failure)", 1),
    ("", "sbatch: error: QOSMaxSubmitJobPerUserLimit", 1),
]
FAULTS = ["error", "cut", "late", "killed", "missing", "banner", "empty"]


@dataclass
class Job:
    script: str
    state: str = "PENDING"
    submitted: int = field(default_factory=lambda: int(time.time()))

    @property
    def is_live(self) -> bool:
        return self.state not in FINAL


class Model:
    """A Slurm with its jobs; `draw` decides what becomes of each answer."""

    def __init__(self, draw: Any) -> None:
        self.draw = draw
        self.jobs: dict[str, Job] = {}
        # Ended jobs that the controller has forgotten.
        self.purged: set[str] = set()
        self.accepts, self.number, self.sbatch_answer = False, "", ""
        # What is wrong with each program during one command.
        self.faults: dict[str, str | None] = {}

    def draw_faults(self) -> None:
        """Other faults for the next command."""
        programs = ("squeue", "scontrol", "scancel")
        self.faults = {name: self.draw(st.sampled_from([None, *FAULTS])) for name in programs}

    def prepare_sbatch(self) -> None:
        """What the next sbatch answers, and whether the controller then has the job."""
        number = 100 + len(self.jobs)
        kind = self.draw(st.sampled_from(["accepted", "lost", "refused"]))
        self.accepts = kind == "accepted" or (kind == "lost" and self.draw(st.booleans()))
        accepted = [
            (f"Submitted batch job {number}\n", "", 0),
            (f"{number}\n", "", 0),
            (f"Submitted batch job {number}\n", "", 1),
        ]
        stdout, stderr, code = self.draw(
            st.sampled_from({"accepted": accepted, "lost": LOST, "refused": REFUSED}[kind])
        )
        self.number, self.sbatch_answer = str(number), json.dumps([code, stdout, stderr])

    def sbatch(self, argv: list[str], **_: Any) -> Callable[[], str]:
        """In place of submitit's CommandFunction."""

        def answer() -> str:
            if self.accepts:
                self.jobs[self.number] = Job(argv[-1])
            return self.sbatch_answer

        return answer

    def run(self, argv: Sequence[str], *, timeout: float, **_: Any) -> subprocess.CompletedProcess[str]:
        """In place of subprocess.run in commands.py."""
        code, stdout, stderr = self.answer(argv)
        is_search = "--me" in argv
        fault = self.faults.get(argv[0])
        if is_search and fault == "empty":
            fault = None
        if fault == "late":
            raise subprocess.TimeoutExpired(list(argv), timeout)
        if fault == "missing":
            raise FileNotFoundError(argv[0])
        if fault == "error":
            code, stdout, stderr = 1, "", self.draw(st.sampled_from(MESSAGES))
        elif fault == "killed":
            code, stdout, stderr = -9, stdout[: self.draw(st.integers(0, 40))], ""
        elif fault == "banner":
            stdout = f"\ufffd welcome to the cluster\n{stdout}"
        elif fault == "empty" and code == 0:
            stdout = ""
        elif fault == "cut" and stdout:
            at = self.draw(st.integers(1, len(stdout) - 1))
            stdout = stdout[: at - 1] if stdout[at - 1] == "\n" and not is_search else stdout[:at].rstrip("\n")
        return subprocess.CompletedProcess(list(argv), code, stdout, stderr)

    def answer(self, argv: Sequence[str]) -> tuple[int, str, str]:
        """The truth."""
        known = {i: job for i, job in self.jobs.items() if i not in self.purged}
        if argv[0] == "squeue":
            ids = next((a.split("=")[1].split(",") for a in argv if a.startswith("--jobs=")), list(known))
            rows = [self.row(i, known[i]) for i in ids if i in known]
            return (0, "".join(rows), "") if rows or "--me" in argv or len(ids) > 1 else (1, "", UNKNOWN)
        if argv[0] == "scontrol":
            job = known.get(argv[-1])
            if job is None:
                return 1, "", UNKNOWN
            return (
                0,
                f"JobId={argv[-1]} JobName=demo\n   JobState={job.state} Reason=None\n   Command={job.script}\n",
                "",
            )
        if argv[0] == "scancel":
            if argv[-1] in known and known[argv[-1]].is_live:
                known[argv[-1]].state = "CANCELLED"
            return 0, "", ""
        return 1, "", "Slurm accounting storage is disabled"

    def row(self, job_id: str, job: Job) -> str:
        columns = (job_id, job.state, "0", "0", "", "N/A", str(job.submitted), "None", job.script, "demo")
        return "".join(f"{column}\x1f" for column in columns) + "\n"


@dataclass
class Desk:
    """The commands of one user on one run."""

    model: Model
    run: RunDir
    environ: dict[str, str]
    prepared: Prepared

    def submit(self) -> None:
        self.model.prepare_sbatch()
        hand_over(self.prepared, run_written(self.run, self.prepared.bundles, code={}))

    def resume(self) -> None:
        self.model.prepare_sbatch()
        resume(self.run, environ=self.environ)

    def cancel(self) -> None:
        cancel_run(self.run)

    def look(self) -> None:
        (status,) = collect_status([self.run])
        if status.state.state == "COMPLETED":
            assert any(job.state == "COMPLETED" for job in self.model.jobs.values())
        assert blamed_nodes(add_card(status)) == []

    def pass_time(self) -> None:
        """The live job begins or ends, and Slurm may forget it."""
        draw = self.model.draw
        for job_id, job in self.model.jobs.items():
            if job.is_live:
                job.state = draw(st.sampled_from(["PENDING", "RUNNING", "FAILED", "TIMEOUT", "COMPLETED"]))
                sent = SubmissionRecord.load(self.run.submission_json)
                if job.state != "PENDING" and sent is not None and sent.job_id == job_id and draw(st.booleans()):
                    # A job that runs writes every 15 s; NFS may show this desk an old file.
                    state = job.state if job.state in ("RUNNING", "COMPLETED") else "RUNNING"
                    StatusRecord(
                        state=state, cluster="slurm", job_id=job_id, attempt=1, updated_at=time.time() - 3600
                    ).write(self.run.status_json)
            if not job.is_live and draw(st.booleans()):
                self.model.purged.add(job_id)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder whose bin/ is on PATH, with clocks that do not wait."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "bin").mkdir()
    for name in ("sbatch", "srun"):
        (folder / "bin" / name).touch(0o755)
    clock = itertools.count(0.0, 10.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{folder / 'bin'}:/usr/bin:/bin")
        patch.setenv("JANUS_HOME", str(folder / "home"))
        patch.setattr(submission, "time", SimpleNamespace(monotonic=lambda: next(clock), sleep=lambda _s: None))
        yield folder


@pytest.fixture(scope="module")
def prepared(place: Path) -> Prepared:
    run = RunDir(place / "home" / "runs" / "demo-1")
    loaded = load_job(jobs_dir() / "demo.yaml", environ={})
    resolved = resolve_job(loaded, run_dir=run.path, cluster="slurm", environ={}, cwd=place, python=sys.executable)
    manifest = collect_manifest(jobs_dir() / "demo.yaml", code={})
    bundles = render_bundles(resolved, job_yaml_text="name: demo\n", secrets={}, manifest=manifest)
    return Prepared(run=run, resolved=resolved, bundles=bundles, cluster="slurm", slurm_conf=None)


@pytest.mark.slow
@drawn(300)
@given(data=st.data())
def test_no_answer_of_slurm_makes_two_jobs_or_loses_one(data: st.DataObject, place: Path, prepared: Prepared) -> None:
    model = Model(data.draw)
    desk = Desk(model, prepared.run, {"JANUS_HOME": str(place / "home")}, prepared)
    shutil.rmtree(desk.run.path, ignore_errors=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(submitit.core.utils, "CommandFunction", model.sbatch)
        patch.setattr(commands, "subprocess", SimpleNamespace(**vars(subprocess) | {"run": model.run}))
        for command in [
            desk.submit,
            *data.draw(
                st.lists(
                    st.sampled_from([desk.resume, desk.resume, desk.cancel, desk.look, desk.pass_time]),
                    min_size=3,
                    max_size=5,
                )
            ),
        ]:
            model.draw_faults()
            with contextlib.suppress(JanusError):
                command()
            live = [job_id for job_id, job in model.jobs.items() if job.is_live]
            assert len(live) <= 1, "two jobs write into one run folder"
            assert not live or desk.run.bundle(1).job_sbatch.is_file(), "the folder of a live job was removed"
            if not desk.run.path.exists():
                break
