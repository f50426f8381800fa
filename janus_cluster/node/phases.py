"""State that the phases of one attempt share, and how one phase runs on all nodes: watched and stoppable."""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from janus_cluster.errors import FailureKind, JanusError, StepNotStarted, StoppedOnPurpose
from janus_cluster.job.resolved import ResolvedJob
from janus_cluster.job.setup import advise_on_setup
from janus_cluster.node.batch_log import log_line
from janus_cluster.node.completion import LEAVE_S, Completion
from janus_cluster.node.ledger import Ledger
from janus_cluster.node.port import find_free_port
from janus_cluster.node.stall import with_collective, write_analysis
from janus_cluster.node.status import HEARTBEAT_S, StatusWriter
from janus_cluster.node.steps import Launcher, PhaseProcesses
from janus_cluster.node.watchdog import Watchdog
from janus_cluster.preflight.interfaces import plan_rails
from janus_cluster.preflight.unwritten import read_unwritten
from janus_cluster.run.paths import RunDir
from janus_cluster.run.records.attempt import HangRecord, StopRecord
from janus_cluster.run.records.base import Record
from janus_cluster.run.records.gate import Rail, RailsRecord

R = TypeVar("R", bound=Record)


class Superseded(JanusError):
    """A newer attempt writes into the run folder: Slurm took this job for lost and started it again elsewhere."""


class StopSignals:
    """The stop signals that this process received; the first one gives the reason for the attempt's end."""

    def __init__(self) -> None:
        self.first: int | None = None
        self.since_s = 0.0
        self.count = 0

    def note(self, signum: int) -> None:
        """Record one more signal."""
        if self.first is None:
            self.first, self.since_s = signum, time.monotonic()
        self.count += 1

    @property
    def kind(self) -> FailureKind | None:
        """Why a stopped attempt ends, where the signal shows it: job.sbatch has Slurm send USR1."""
        return "walltime" if self.first == signal.SIGUSR1 else None

    @property
    def name(self) -> str | None:
        return None if self.first is None else signal.Signals(self.first).name


class Attempt:
    """The state that the phases of one attempt share."""

    def __init__(
        self,
        run: RunDir,
        resolved: ResolvedJob,
        launcher: Launcher,
        stop: StopSignals,
        *,
        because: str | None = None,
    ) -> None:
        """`because`: why this option of training.memory: auto runs instead of the one before it."""
        self.run = run
        self.resolved = resolved
        self.launcher = launcher
        self.stop = stop
        self.because = because
        self.number = run.begin_attempt()
        self.ledger = Ledger(
            run,
            attempt=self.number,
            job_id=launcher.job_id,
            nodes=launcher.nodes,
            bundle=resolved.bundle,
            memory=resolved.memory,
            because=because,
        )
        self.status = StatusWriter(
            run, cluster=launcher.cluster, job_id=launcher.job_id, attempt=self.number, nodes=launcher.nodes
        )
        self.port = 0
        self.connections: Mapping[str, dict[str, Any] | None] = {}
        self.hang: HangRecord | None = None
        # The ranks had completed training, and their processes were ended here.
        self.was_overdue = False
        self._last_beat = time.monotonic()
        self._has_logged_stop = False

    @property
    def gate_timeout_s(self) -> float:
        return self.resolved.job.preflight.timeout_s

    def run_phase(self, phase: str, *, timeout_s: float | None, end_together: bool) -> int:
        """Run the phase on every node; its worst exit code.

        Raises: StoppedOnPurpose after a stop signal, StepNotStarted.
        """
        logged = self._logged_bytes()
        step = self._start(phase, end_together=end_together)
        code = step.wait(timeout_s=timeout_s, on_wait=self._end_if_stopped)
        if self.stop.first is not None:
            raise StoppedOnPurpose(f"{self.stop.name} ended the attempt during phase {phase}", kind=self.stop.kind)
        self._require_begun(phase, step, code, logged)
        return code

    def _require_begun(self, phase: str, step: PhaseProcesses, code: int, logged: int) -> None:
        """Raises: StepNotStarted for a step that failed before a task began on any node, this one among them.

        A task's first act is a line in its node's log, or where it cannot write there, in batch.log.
        """
        if not code or self._logged_bytes() != logged or read_unwritten(self.run.batch_log, attempt=self.number):
            return
        if not self.run.path.is_dir():
            # Moved or removed while the step ran: what its tasks wrote is no longer to be seen from here.
            return
        messages = step.launcher_messages()
        if not messages and self.launcher.cluster == "local":
            return
        reason = "; ".join(messages) or f"no message; see {self.run.batch_log}"
        of_setup = next((message for message in messages if "environment.setup_each_node" in message), None)
        raise StepNotStarted(
            f"no task of phase {phase} began on any node (exit code {code}): {reason}",
            hint=advise_on_setup(of_setup)
            if of_setup is not None
            else "slurm.… and srun_extra of the job file, or the site: no node is blamed, and nothing was excluded",
            kind=None if of_setup is None else "environment",
        )

    def _logged_bytes(self) -> int:
        """The size of the nodes' logs. What node 0 wrote is seen at once: it is this machine."""
        sizes = 0
        for node in self.launcher.nodes:
            with contextlib.suppress(OSError):
                sizes += self.run.node_log(self.number, node).stat().st_size
        return sizes

    def run_training_phase(self) -> int:
        """Run training; the worst exit code. After a stop signal the ranks get time for a checkpoint.

        `hang` is set where the ranks were ended because they hung, `was_overdue` where they had completed and did not
        end. Raises: StepNotStarted.
        """
        job = self.resolved.job
        watchdog = Watchdog(
            self.run,
            attempt=self.number,
            world_size=self.resolved.world_size,
            hang_timeout_s=job.training.hang_timeout_s,
            start_timeout_s=job.training.ddp_timeout_s,
        )
        completion = Completion(self.run, attempt=self.number)
        logged = self._logged_bytes()
        step = self._start("train", end_together=True)
        code = step.wait(timeout_s=None, on_wait=lambda s: self._watch_training(s, watchdog, completion))
        if self.stop.first is None and self.hang is None:
            self._require_begun("train", step, code, logged)
        return code

    def _start(self, phase: str, *, end_together: bool) -> PhaseProcesses:
        seed = int("".join(filter(str.isdigit, self.launcher.job_id or "")) or 0)
        # The same port in every phase, unless another process took it meanwhile: the gate tests what training uses.
        self.port = find_free_port(seed=seed)
        argv = [sys.executable, "-m", "janus_cluster.node.task", str(self.run.path)]
        if self.resolved.job.environment.setup_each_node:
            argv = ["bash", str(self.run.bundle(self.resolved.bundle).each_node_sh), *argv]
        argv += ["--attempt", str(self.number), "--phase", phase, "--bundle", str(self.resolved.bundle)]
        argv += ["--master-addr", self.launcher.master_addr(), "--master-port", str(self.port)]
        return self.launcher.start(argv, end_together=end_together)

    def _end_if_stopped(self, step: PhaseProcesses) -> None:
        if self.stop.first is not None:
            step.terminate()
        self._write_heartbeat(step)

    def _watch_training(self, step: PhaseProcesses, watchdog: Watchdog, completion: Completion) -> None:
        self._write_heartbeat(step)
        if self.stop.first is not None:
            self._stop_training(step)
        elif completion.is_overdue():
            self.was_overdue = True
            log_line(f"training: complete, but its processes have not ended in {LEAVE_S:.0f} s; they are ended")
            step.terminate()
        elif not completion.is_recorded and (hang := watchdog.look(is_blind=not self.status.is_written)) is not None:
            world_size = self.resolved.world_size
            self.hang = with_collective(self.run, hang, attempt=self.number, world_size=world_size)
            self.ledger.write(hang=self.hang)
            log_line(f"training: {hang.message}; the ranks are ended")
            if self.hang.collective is not None:
                log_line(f"training: {self.hang.collective}")
            step.terminate()
            write_analysis(self.run, attempt=self.number, world_size=world_size)

    def _stop_training(self, step: PhaseProcesses) -> None:
        """Ask the ranks once to stop; a second signal, or the time limit, ends them."""
        path, limit_s = self.run.stop_json(self.number), self.resolved.job.restart.stop_timeout_s
        if not path.exists() and self.stop.name is not None:
            # Where the request cannot be written now, this is tried again until the time limit.
            with contextlib.suppress(OSError):
                StopRecord(signal=self.stop.name, time=time.time()).write(path)
        if not self._has_logged_stop:
            self._has_logged_stop = True
            log_line(
                f"{self.stop.name}: the ranks stop at the next step boundary, with a checkpoint ({limit_s} s at most)"
            )
        if self.stop.count > 1 or time.monotonic() - self.stop.since_s > limit_s:
            step.terminate()

    def _write_heartbeat(self, step: PhaseProcesses) -> None:
        """Raises: Superseded, with the step ended; on a file system without locks this stops a second writer."""
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
            # A file system that is away for a moment; the next check finds it.
            return self.number

    def read_reports(self, kind: type[R], path_of: Callable[[str], Path], *, wait_s: float) -> dict[str, R | None]:
        """Each node's record; None for a node that wrote none within `wait_s`."""
        deadline = time.monotonic() + wait_s
        paths = {node: path_of(node) for node in self.launcher.nodes}
        while time.monotonic() < deadline and not all(p.exists() for p in paths.values()):
            time.sleep(0.2)
        return {node: kind.load(path) for node, path in paths.items()}

    def write_rails(self, facts: Mapping[str, Mapping[str, Any] | None]) -> None:
        """Write rails.json, the pairs that the probe tests: GPU k of both nodes, or the networks that they share."""
        if len(self.launcher.nodes) < 2:
            return
        if self.resolved.job.hardware.device == "cuda":
            rails = [Rail(name=f"gpu{k}") for k in range(self.resolved.processes_per_node)]
        else:
            planned = plan_rails({node: (f or {}).get("interfaces", []) for node, f in facts.items()})
            rails = [Rail(name=rail["name"], interfaces=rail["interfaces"]) for rail in planned]
        RailsRecord(rails=tuple(rails)).write(self.run.rails_json(self.number))
