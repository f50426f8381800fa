"""What the phases of one attempt share, and how one of them runs on all nodes: watched, and stopped when asked to."""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from janus_cluster.config.schema import ResolvedJob
from janus_cluster.errors import JanusError, StoppedOnPurpose
from janus_cluster.node.batch_log import say
from janus_cluster.node.ledger import Ledger
from janus_cluster.node.port import find_free_port
from janus_cluster.node.status import HEARTBEAT_S, StatusFile
from janus_cluster.node.steps import Launcher, Step
from janus_cluster.node.watchdog import Hang, Watchdog
from janus_cluster.preflight.interfaces import plan_rails
from janus_cluster.rundir import RunDir, read_json, write_json_atomically


class Superseded(JanusError):
    """A newer attempt writes into the run folder: this job was taken for lost, and begun again elsewhere."""


class StopSignals:
    """The stop signals that came to this process; the first one says why the attempt ends."""

    def __init__(self) -> None:
        self.first: int | None = None
        self.since_s = 0.0
        self.count = 0

    def note(self, signum: int) -> None:
        """One more has come."""
        if self.first is None:
            self.first, self.since_s = signum, time.monotonic()
        self.count += 1

    @property
    def name(self) -> str | None:
        return None if self.first is None else signal.Signals(self.first).name


class Attempt:
    """The state that the phases of one attempt share."""

    def __init__(self, run: RunDir, resolved: ResolvedJob, launcher: Launcher, stop: StopSignals) -> None:
        self.run = run
        self.resolved = resolved
        self.launcher = launcher
        self.stop = stop
        self.number = run.begin_attempt()
        self.ledger = Ledger(
            run, attempt=self.number, job_id=launcher.job_id, nodes=launcher.nodes, memory=resolved.memory
        )
        self.status = StatusFile(
            run, cluster=launcher.cluster, job_id=launcher.job_id, attempt=self.number, nodes=launcher.nodes
        )
        self.port = 0
        self.connections: Mapping[str, dict[str, Any] | None] = {}
        self.hang: Hang | None = None
        self._last_beat = time.monotonic()
        self._has_told_stop = False

    @property
    def gate_timeout_s(self) -> float:
        return self.resolved.job.preflight.timeout_s

    def run_phase(self, phase: str, *, timeout_s: float | None, end_together: bool) -> int:
        """The phase has run on every node; its worst exit code. Raises: StoppedOnPurpose after a stop signal."""
        code = self._start(phase, end_together=end_together).wait(timeout_s=timeout_s, on_wait=self._end_if_stopped)
        if self.stop.first is not None:
            raise StoppedOnPurpose(f"{self.stop.name} ended the attempt during phase {phase}")
        return code

    def run_training_phase(self) -> int:
        """The ranks have ended; their worst exit code. Asked to stop, they may take their time for a checkpoint.

        `hang` is set where they stood still and were ended for that.
        """
        job = self.resolved.job
        watchdog = Watchdog(
            self.run,
            attempt=self.number,
            world_size=self.resolved.world_size,
            hang_timeout_s=job.training.hang_timeout_s,
            start_timeout_s=job.training.ddp_timeout_s,
        )
        step = self._start("train", end_together=True)
        return step.wait(timeout_s=None, on_wait=lambda s: self._watch_training(s, watchdog))

    def _start(self, phase: str, *, end_together: bool) -> Step:
        seed = int("".join(filter(str.isdigit, self.launcher.job_id or "")) or 0)
        # The same port in every phase, unless somebody took it meanwhile: the gate tests what training uses.
        self.port = find_free_port(seed=seed)
        argv = [sys.executable, "-m", "janus_cluster.node.task", str(self.run.path)]
        argv += ["--attempt", str(self.number), "--phase", phase, "--config-hash", self.resolved.config_hash]
        argv += ["--master-addr", self.launcher.master_addr(), "--master-port", str(self.port)]
        return self.launcher.start(argv, end_together=end_together)

    def _end_if_stopped(self, step: Step) -> None:
        if self.stop.first is not None:
            step.terminate()
        self._tell_that_it_lives(step)

    def _watch_training(self, step: Step, watchdog: Watchdog) -> None:
        self._tell_that_it_lives(step)
        if self.stop.first is not None:
            self._stop_training(step)
        elif (hang := watchdog.look(is_blind=not self.status.is_written)) is not None:
            self.hang = hang
            self.ledger.write(hang={"rank": hang.rank, "node": hang.node, "message": hang.message})
            say(f"training: {hang.message}; the ranks are ended")
            step.terminate()

    def _stop_training(self, step: Step) -> None:
        """The ranks are told once; a second signal, or too long a time, ends them."""
        path, limit_s = self.run.stop_json(self.number), self.resolved.job.restart.stop_timeout_s
        if not path.exists():
            # Where it cannot be written now, this is tried again until the time is up.
            with contextlib.suppress(OSError):
                write_json_atomically(path, {"schema_version": 1, "signal": self.stop.name, "time": time.time()})
        if not self._has_told_stop:
            self._has_told_stop = True
            say(f"{self.stop.name}: the ranks stop at the next step boundary, with a checkpoint ({limit_s} s at most)")
        if self.stop.count > 1 or time.monotonic() - self.stop.since_s > limit_s:
            step.terminate()

    def _tell_that_it_lives(self, step: Step) -> None:
        """Raises: Superseded, with the step ended; attempt.lock keeps nobody out where a file system has no locks."""
        if time.monotonic() - self._last_beat < HEARTBEAT_S:
            return
        self._last_beat = time.monotonic()
        if (newest := self._newest_attempt()) > self.number:
            step.terminate()
            raise Superseded(
                f"attempt {newest} has begun in {self.run.path}: attempt {self.number} leaves it the run folder"
            )
        self.status.update()

    def _newest_attempt(self) -> int:
        try:
            return max(self.run.attempts(), default=self.number)
        except OSError:
            # A file system that is away for a moment; the next look tells.
            return self.number

    def read_reports(self, path_of: Callable[[str], Path], *, wait_s: float) -> dict[str, dict[str, Any] | None]:
        """Each node's JSON; None for a node that wrote none within `wait_s`."""
        deadline = time.monotonic() + wait_s
        paths = {node: path_of(node) for node in self.launcher.nodes}
        while time.monotonic() < deadline and not all(p.exists() for p in paths.values()):
            time.sleep(0.2)
        return {node: read_json(p) if p.exists() else None for node, p in paths.items()}

    def write_rails(self, facts: Mapping[str, dict[str, Any] | None]) -> None:
        """rails.json tells the probe which pairs to test: GPU k of both nodes, or the networks that they share."""
        if len(self.launcher.nodes) < 2:
            return
        if self.resolved.job.hardware.device == "cuda":
            rails = [{"name": f"gpu{k}", "interfaces": {}} for k in range(self.resolved.processes_per_node)]
        else:
            rails = plan_rails({node: (f or {}).get("interfaces", []) for node, f in facts.items()})
        write_json_atomically(self.run.rails_json(self.number), {"schema_version": 1, "rails": rails})
