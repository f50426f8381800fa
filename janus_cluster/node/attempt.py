"""One attempt, once per allocation, on node 0: gate, then training, and a truthful end.

    python -m janus_cluster.node.attempt RUN_DIR --launcher slurm|local

job.sbatch becomes this program. It runs every phase as one step over all nodes, judges between them, and keeps
status.json.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from janus_cluster.config.schema import ResolvedJob
from janus_cluster.errors import GateFailed, JanusError, StoppedOnPurpose, TrainingFailed
from janus_cluster.node.port import find_free_port
from janus_cluster.node.retry import retry_without_bad_nodes
from janus_cluster.node.status import HEARTBEAT_S, StatusFile
from janus_cluster.node.steps import Launcher, Step
from janus_cluster.preflight.bandwidth import counter_deltas
from janus_cluster.preflight.cross_node import describe_loopback
from janus_cluster.preflight.gate import (
    Surroundings,
    build_verdict,
    judge_active,
    judge_connections,
    judge_cross_node,
    judge_static,
    require_fresh,
)
from janus_cluster.preflight.interfaces import plan_rails
from janus_cluster.preflight.model import CheckResult, Verdict
from janus_cluster.preflight.report import render_verdict, render_verdict_markdown
from janus_cluster.preflight.transport import read_nccl_logs
from janus_cluster.rundir import RunDir, read_json, write_json_atomically, write_text_atomically

# A file that another node has just written may need this long to be seen through NFS attribute caches.
_VISIBILITY_S = 10.0


class Attempt:
    """The state that the phases of one attempt share."""

    def __init__(self, run: RunDir, resolved: ResolvedJob, launcher: Launcher) -> None:
        self.run = run
        self.resolved = resolved
        self.launcher = launcher
        self.number = run.begin_attempt()
        self.status = StatusFile(
            run, cluster=launcher.cluster, job_id=launcher.job_id, attempt=self.number, nodes=launcher.nodes
        )
        self.port = 0
        self.connections: Mapping[str, dict[str, Any] | None] = {}
        self.stop_signal: int | None = None
        self._last_beat = time.monotonic()

    @property
    def gate_timeout_s(self) -> float:
        return self.resolved.job.preflight.timeout_s

    def run_phase(self, phase: str, *, timeout_s: float | None, end_together: bool) -> int:
        """The phase has run on every node; its worst exit code. Raises: StoppedOnPurpose after a stop signal."""
        seed = int("".join(filter(str.isdigit, self.launcher.job_id or "")) or 0)
        # The same port in every phase, unless somebody took it meanwhile: the gate tests what training uses.
        self.port = find_free_port(seed=seed)
        argv = [sys.executable, "-m", "janus_cluster.node.task", str(self.run.path)]
        argv += ["--attempt", str(self.number), "--phase", phase]
        argv += ["--master-addr", self.launcher.master_addr(), "--master-port", str(self.port)]
        step = self.launcher.start(argv, end_together=end_together)
        code = step.wait(timeout_s=timeout_s, on_wait=lambda: self._between(step))
        if self.stop_signal is not None:
            name = signal.Signals(self.stop_signal).name
            raise StoppedOnPurpose(f"{name} ended the attempt during phase {phase}")
        return code

    def _between(self, step: Step) -> None:
        if self.stop_signal is not None:
            step.terminate()
        if time.monotonic() - self._last_beat >= HEARTBEAT_S:
            self._last_beat = time.monotonic()
            self.status.update()

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


def run_attempt(run: RunDir, launcher: Launcher) -> int:
    """The attempt is over and status.json says how. Returns: the exit code of the job (table in errors.py)."""
    resolved = ResolvedJob.load(run.resolved_json.read_text(encoding="utf-8"))
    attempt = Attempt(run, resolved, launcher)

    def on_stop(signum: int, _frame: FrameType | None) -> None:
        attempt.stop_signal = signum

    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, on_stop)
    # job.sbatch asks Slurm for USR1 before the walltime ends; unhandled it would kill the attempt at once.
    signal.signal(signal.SIGUSR1, lambda *_: say("Slurm: the walltime ends soon"))
    say(f"attempt {attempt.number} of {run.name}: job {launcher.job_id} on {', '.join(launcher.nodes)}")
    try:
        if resolved.job.preflight.enabled:
            run_gate(attempt)
        else:
            say("preflight: skipped, because the job says preflight.enabled: false")
        if resolved.job.kind == "train":
            run_training(attempt)
    except StoppedOnPurpose as e:
        attempt.status.finish("CANCELLED", e.exit_code, reason=e.message, signal=attempt.stop_signal)
        return _end(e)
    except GateFailed as e:
        end_failed_gate(attempt, e)
        return _end(e)
    except JanusError as e:
        attempt.status.finish("FAILED", e.exit_code, reason=e.message)
        return _end(e)
    except BaseException as e:
        attempt.status.finish("FAILED", 1, reason=f"{type(e).__name__}: {e}")
        raise
    attempt.status.finish("COMPLETED", 0)
    say(f"attempt {attempt.number}: completed")
    return 0


def run_gate(attempt: Attempt) -> None:
    """The verdict is written and training may begin. Raises: GateFailed, GateUndetermined.

    A phase that failed is the last: a node that is known to be bad would only make the others wait for it. So is one
    that could not be judged: where nvidia-smi hangs, CUDA does too.
    """
    results: list[CheckResult] = []
    for phase in (check_nodes, check_connections, check_speed):
        results += phase(attempt)
        if any(r.state in ("FAIL", "ERROR") for r in results):
            break
    verdict = write_verdict(attempt, results)
    print_verdict(verdict)
    again = Verdict.from_json(read_json(attempt.run.verdict_json(attempt.number)))
    launcher = attempt.launcher
    require_fresh(again, attempt.resolved, nodes=launcher.nodes, job_id=launcher.job_id, now=time.time())


def check_nodes(attempt: Attempt) -> list[CheckResult]:
    """Each node told what it is; every static check, and the nodes against each other. The rails are written down."""
    run, number = attempt.run, attempt.number
    code = attempt.run_phase("facts", timeout_s=attempt.gate_timeout_s, end_together=False)
    facts = attempt.read_reports(lambda n: run.facts_json(number, n), wait_s=0 if code else _VISIBILITY_S)
    attempt.write_rails(facts)
    return judge_static(facts, attempt.resolved) + judge_cross_node(facts)


def check_connections(attempt: Attempt) -> list[CheckResult]:
    """Every node reached node 0 on the master port, and was reached back. Nothing for a single node."""
    run, number = attempt.run, attempt.number
    if len(attempt.launcher.nodes) < 2:
        return []
    code = attempt.run_phase("connect", timeout_s=attempt.gate_timeout_s, end_together=False)
    attempt.connections = attempt.read_reports(
        lambda n: run.connect_json(number, n), wait_s=0 if code else _VISIBILITY_S
    )
    return judge_connections(
        attempt.connections,
        address=attempt.launcher.master_addr(),
        port=attempt.port,
        clock_warn_s=attempt.resolved.preflight_thresholds["clock"]["warn_above_s"],
    )


def check_speed(attempt: Attempt) -> list[CheckResult]:
    """Devices, rails and the all-reduce were measured, between two readings of the error counters."""
    run, number = attempt.run, attempt.number
    code = attempt.run_phase("all_reduce", timeout_s=attempt.gate_timeout_s, end_together=True)
    wait_s = 0 if code else _VISIBILITY_S
    measured = attempt.read_reports(lambda n: run.all_reduce_json(number, n), wait_s=wait_s)
    counters = attempt.read_reports(lambda n: run.counters_json(number, n), wait_s=wait_s)
    around = Surroundings(
        counters={n: c and counter_deltas(c["before"], c["after"]) for n, c in counters.items()},
        nccl={n: read_nccl_logs(run.nccl_logs(number, n)) for n in attempt.launcher.nodes},
        evidence=describe_loopback(attempt.connections),
    )
    return judge_active(measured, attempt.resolved, around)


def end_failed_gate(attempt: Attempt, error: GateFailed) -> None:
    """The job is queued again without the bad node, where it asks for that and it can be; else it has failed."""
    verdict = Verdict.from_json(read_json(attempt.run.verdict_json(attempt.number)))
    # STOPPED may begin again, so nobody takes the next word for the last one while the requeue is under way.
    attempt.status.update(state="STOPPED", reason=error.message, exit_code=error.exit_code)
    is_queued, words = retry_without_bad_nodes(
        attempt.run, attempt.resolved, attempt.launcher, verdict, attempt=attempt.number
    )
    asked = attempt.resolved.job.preflight.on_fail != "stop"
    say(f"preflight: {words}")
    reason = f"{error.message}; {words}" if asked else error.message
    attempt.status.finish("STOPPED" if is_queued else "FAILED", error.exit_code, reason=reason)


def write_verdict(attempt: Attempt, results: Sequence[CheckResult]) -> Verdict:
    """The verdict of all nodes and of each node lies in the run folder."""
    run, launcher = attempt.run, attempt.launcher
    verdict = build_verdict(results, attempt.resolved, nodes=launcher.nodes, job_id=launcher.job_id, now=time.time())
    for node in launcher.nodes:
        write_json_atomically(run.node_verdict_json(attempt.number, node), verdict.of_node(node).to_json())
    write_text_atomically(run.verdict_md(attempt.number), render_verdict_markdown(verdict))
    write_json_atomically(run.verdict_json(attempt.number), verdict.to_json())
    return verdict


def print_verdict(verdict: Verdict) -> None:
    """The table is in batch.log, wide enough for one line per check."""
    from rich.console import Console

    Console(width=160, file=sys.stdout, no_color=True).print(render_verdict(verdict))
    sys.stdout.flush()


def run_training(attempt: Attempt) -> None:
    """Training has ended well on every rank. Raises: TrainingFailed naming where the log is."""
    attempt.status.update(phase="training")
    resolved = attempt.resolved
    say(f"training: {resolved.world_size} ranks, effective batch {resolved.effective_batch_size}")
    code = attempt.run_phase("train", timeout_s=None, end_together=True)
    if code:
        logs = attempt.run.attempt_logs(attempt.number)
        raise TrainingFailed(f"training ended with exit code {code}; the ranks' logs are in {logs}")


def say(text: str) -> None:
    """One line in batch.log, at once."""
    print(text, flush=True)


def _end(error: JanusError) -> int:
    say(f"ended: {error.message}" + (f"\nnext: {error.hint}" if error.hint else ""))
    return error.exit_code


def build_launcher(name: str, resolved: ResolvedJob, environ: Mapping[str, str]) -> Launcher:
    """The launcher that job.sbatch named: srun inside an allocation, or processes on this machine."""
    if name == "local":
        from janus_cluster.local.launcher import LocalLauncher

        return LocalLauncher(resolved.job.nodes)
    from janus_cluster.slurm.launcher import SlurmLauncher

    return SlurmLauncher.of_allocation(environ, cluster=resolved.cluster, num_nodes=resolved.job.nodes)


def main(argv: Sequence[str] | None = None) -> None:
    """The attempt has run and the process has ended with the job's exit code."""
    parser = argparse.ArgumentParser(prog="python -m janus_cluster.node.attempt", description=__doc__)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--launcher", choices=["slurm", "local"], required=True)
    args = parser.parse_args(argv)
    run = RunDir(args.run_dir)
    try:
        resolved = ResolvedJob.load(run.resolved_json.read_text(encoding="utf-8"))
        launcher = build_launcher(args.launcher, resolved, os.environ)
    except JanusError as e:
        sys.exit(_end(e))
    sys.exit(run_attempt(run, launcher))


if __name__ == "__main__":
    main()
