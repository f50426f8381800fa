"""Demo jobs on a sandbox: submitted, watched through their files, compared step by step with an undisturbed run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from run_files import read_metric_lines

from janus_cluster.run.files import read_json
from janus_cluster.run.paths import RunDir
from janus_cluster.sandbox import SandboxInfo

Curve = dict[int, float]
EVERY = 4
# States that status.json may have before the awaited one: the last two between two attempts.
ON_THE_WAY = ("RUNNING", "STOPPED", "CANCELLED")
STEPS = 20
# The gate is the other test files' subject; a constant rate makes the curve independent of the number of steps.
JOB = (
    "--no-preflight",
    *("--set", "training.logging_steps=1"),
    *("--set", "training.lr_scheduler=constant"),
    *("--set", "training.warmup_ratio=0"),
    *("--set", f"checkpoint.every_steps={EVERY}"),
    *("--set", "checkpoint.export=false"),
    *("--set", "preflight.use_node_memory=false"),
)


class Runs:
    """janus-cluster and Slurm for the tests of this file, with a home of their own around the session's sandbox."""

    def __init__(self, folder: Path, sandbox: SandboxInfo, *, data: Path) -> None:
        self.folder = folder
        self.sandbox = sandbox
        self.data = data
        self.jobs: list[Job] = []
        (folder / "sandbox").symlink_to(sandbox.home)

    def janus(self, *argv: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "janus_cluster.cli", *argv],
            cwd=self.folder,
            env=os.environ | {"JANUS_HOME": str(self.folder), "DEMO_DATA": str(self.data)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=600,
        )

    def slurm(self, *argv: str, check: bool = True) -> str:
        environ = os.environ | self.sandbox.env()
        done = subprocess.run(argv, env=environ, capture_output=True, text=True, check=check, timeout=600)
        return done.stdout

    def submit(self, *sets: str, steps: int = STEPS, with_gate: bool = False) -> Job:
        done = self.janus(
            *("submit", "demo", "--nodes", "2", "--cluster", "sandbox", "--json", *JOB[with_gate:]),
            *("--set", f"training.max_steps={steps}"),
            *(word for value in sets for word in ("--set", value)),
        )
        assert done.returncode == 0, done.stderr
        value = json.loads(done.stdout)
        self.jobs.append(Job(self, RunDir(Path(value["run_dir"])), value["job_id"]))
        return self.jobs[-1]

    def end_all(self) -> None:
        """No job of this file is in the queue any more: one that a failed test left would hold up all that follow."""
        while self.jobs:
            self.jobs.pop().end()


class Job:
    """One submitted run, watched through its files."""

    def __init__(self, runs: Runs, run: RunDir, job_id: str) -> None:
        self.runs = runs
        self.run = run
        self.id = job_id
        self.pending_since_s: float | None = None

    def wait_for_step(self, step: int, *, attempt: int = 1) -> None:
        self.wait_until(lambda: any(e["step"] >= step and e["attempt"] >= attempt for e in self.events("train")))

    def wait_for_event(self, kind: str) -> None:
        self.wait_until(lambda: bool(self.events(kind)))

    def wait_for_end(self, state: str = "COMPLETED", *, attempt: int = 1) -> dict[str, Any]:
        """The run's status once it is in `state`; a requeued job does not wait for the two minutes of Slurm."""

        def is_over() -> bool:
            own = read_json(self.run.status_json) if self.run.status_json.exists() else {"state": None, "attempt": 0}
            if own["attempt"] >= attempt:
                assert own["state"] in (state, *ON_THE_WAY), self.everything()
                if own["state"] == state:
                    return True
            self.begin_if_requeued()
            return False

        self.wait_until(is_over, pause_s=1.0)
        # The ladder's word, once Slurm has noticed, too.
        self.wait_until(lambda: self.status()["state"] == state, pause_s=1.0, limit_s=60)
        return self.status()

    def begin_if_requeued(self) -> None:
        """A requeued job does not wait for two minutes; but begun in the second of its requeue, slurmd refuses it."""
        if self.slurm_state() != "PENDING":
            self.pending_since_s = None
        elif self.pending_since_s is None:
            self.pending_since_s = time.monotonic()
        elif time.monotonic() - self.pending_since_s > 4:
            self.runs.slurm("scontrol", "update", f"JobId={self.id}", "StartTime=now", check=False)

    def slurm_state(self) -> str:
        return self.runs.slurm("squeue", "--noheader", f"--jobs={self.id}", "--format=%T", check=False).strip()

    def is_in_state(self, state: str) -> bool:
        """Whether squeue reports that; "" of a job that is no more."""
        return self.slurm_state() == state

    def is_running_again(self) -> bool:
        """Whether the second attempt has done a step."""
        self.begin_if_requeued()
        return bool(self.events("train", attempt=2))

    def end(self) -> None:
        """Slurm has forgotten the job. One that is requeueing itself at that moment has to be cancelled again."""

        def is_gone() -> bool:
            self.runs.slurm("scancel", self.id, check=False)
            return self.is_in_state("")

        self.wait_until(is_gone, pause_s=1.0, limit_s=180)

    def status(self) -> dict[str, Any]:
        done = self.runs.janus("status", self.id, "--json")
        assert done.returncode == 0, done.stderr
        value: dict[str, Any] = json.loads(done.stdout)
        return value | {"attempt": value["attempt"] or 0}

    def words(self) -> str:
        return self.runs.janus("status", self.id).stdout

    def events(self, kind: str, *, attempt: int | None = None) -> list[dict[str, Any]]:
        found = [e for e in read_metric_lines(self.run) if e["kind"] == kind]
        return [e for e in found if attempt in (None, e["attempt"])]

    def curve(self, *, attempt: int | None = None) -> Curve:
        return read_curve(self.run, attempt=attempt)

    def pid(self, rank: int) -> int:
        return int(read_json(self.run.heartbeat_json(1, rank))["pid"])

    def requires(self, reference: Curve, *, steps: int = STEPS) -> None:
        """Every step is there, and each loss is that of the run that nothing happened to, bit for bit."""
        curve = self.curve()
        assert sorted(curve) == list(range(1, steps + 1)), self.everything()
        assert {s: loss for s, loss in curve.items() if s in reference} == {
            s: loss for s, loss in reference.items() if s <= steps
        }

    def resumed_at(self) -> list[tuple[int, int]]:
        """(attempt, step) of every resume; the attempt's first step is the next one."""
        found = [(e["attempt"], e["step"]) for e in self.events("resume")]
        for attempt, step in found:
            assert min(self.curve(attempt=attempt)) == step + 1
        return found

    def everything(self) -> str:
        logs = [self.run.batch_log, *sorted(self.run.logs.glob("attempt_*/*.log"))]
        return "\n".join(f"--- {p.name}\n{p.read_text(errors='replace')[-2500:]}" for p in logs if p.exists())

    def wait_until(self, is_done: Callable[[], bool], *, pause_s: float = 0.2, limit_s: float = 600) -> None:
        """Nothing is waited for longer than `limit_s` without a step: how fast steps are is the machine's business."""
        deadline, size = time.monotonic() + limit_s, -1
        while not is_done():
            if (grown := self.metrics_bytes()) != size:
                deadline, size = time.monotonic() + limit_s, grown
            assert time.monotonic() < deadline, self.everything()
            time.sleep(pause_s)

    def metrics_bytes(self) -> int:
        return self.run.metrics_jsonl.stat().st_size if self.run.metrics_jsonl.exists() else 0


def read_curve(run: RunDir, *, attempt: int | None = None) -> Curve:
    """Step → loss of the logged steps; of a step that was done twice, the last."""
    lines = [e for e in read_metric_lines(run) if e["kind"] == "train" and attempt in (None, e["attempt"])]
    return {e["step"]: e["loss"] for e in lines}


def requires_nothing_lost(run: RunDir, *, resumed_at: int, steps: int) -> None:
    """Attempt 2 has the steps after `resumed_at`; one that was done twice has the same loss, bit for bit."""
    before, after = read_curve(run, attempt=1), read_curve(run, attempt=2)
    assert sorted(after) == list(range(resumed_at + 1, steps + 1))
    assert {s: after[s] for s in after if s in before} == {s: before[s] for s in before if s in after}


def wait_until(is_done: Callable[[], bool], *, pause_s: float = 0.2, limit_s: float = 180) -> None:
    deadline = time.monotonic() + limit_s
    while not is_done():
        assert time.monotonic() < deadline
        time.sleep(pause_s)
