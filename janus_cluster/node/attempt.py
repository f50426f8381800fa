"""The job's program on node 0: attempts, each of them gate and training, until one ends well or another would not help.

    python -m janus_cluster.node.attempt RUN_DIR --launcher slurm|local

job.sbatch becomes this program. It runs every phase as one step over all nodes, judges between them, and keeps
status.json.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from janus_cluster.config.schema import ResolvedJob
from janus_cluster.errors import GateFailed, JanusError, StoppedOnPurpose, TrainingFailed
from janus_cluster.node.batch_log import say
from janus_cluster.node.code import check_code
from janus_cluster.node.gate import queue_again_without_bad_nodes, run_gate
from janus_cluster.node.index import run_index
from janus_cluster.node.ledger import newest_step
from janus_cluster.node.lock import run_folder_held
from janus_cluster.node.memory import (
    describe_option,
    describe_taken,
    has_stepped,
    is_out_of_memory,
    load_settled,
    take_next_option,
)
from janus_cluster.node.phases import Attempt, StopSignals, Superseded
from janus_cluster.node.steps import Launcher
from janus_cluster.node.training import BY_SLURM, TRANSIENT, describe_failure, find_failure, run_training
from janus_cluster.rundir import RunDir
from janus_cluster.stamped import stamp_output

# The batch process of a requeued job may still be ending on another node.
_WAIT_FOR_LOCK_S = 60.0


def run_job(run: RunDir, launcher: Launcher) -> int:
    """The job is over and status.json says how. Returns: its exit code (table in errors.py).

    Raises: UsageError while another job's attempt writes into the run folder; nothing was touched.
    """
    stop = StopSignals()
    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        # job.sbatch asks Slurm for USR1 before the walltime ends.
        signal.signal(signum, lambda number, _frame: stop.note(number))
    if early := os.environ.get("JANUS_STOP_SIGNAL"):
        # It came to job.sbatch while the environment was being prepared.
        stop.note(signal.Signals[f"SIG{early}"])
    with run_folder_held(run, job_id=launcher.job_id, wait_s=_WAIT_FOR_LOCK_S):
        while True:
            # Read anew: an attempt that ran out of memory leaves a smaller option behind.
            code = run_attempt(Attempt(run, load_settled(run), launcher, stop))
            if code is not None:
                return code


def run_attempt(attempt: Attempt) -> int | None:
    """The attempt is over. Returns: the job's exit code, or None where one more attempt in this allocation may help."""
    resolved, launcher = attempt.resolved, attempt.launcher
    say(f"attempt {attempt.number} of {attempt.run.name}: job {launcher.job_id} on {', '.join(launcher.nodes)}")
    if resolved.memory is not None:
        say(describe_option(resolved.memory))
    try:
        for change in check_code(attempt.run, resolved, attempt=attempt.number):
            say(f"warning: {change}")
        require_progress(attempt)
        if resolved.job.preflight.enabled:
            run_gate(attempt)
        else:
            say("preflight: skipped, because the job says preflight.enabled: false")
        if resolved.job.kind == "train":
            run_training(attempt)
        elif resolved.job.kind == "index":
            run_index(attempt)
    except Superseded as e:
        # status.json is the other attempt's.
        attempt.ledger.end("FAILED", e.exit_code, e.message)
        say(f"ended: {e.message}")
        return e.exit_code
    except StoppedOnPurpose as e:
        return end_stopped(attempt, e)
    except GateFailed as e:
        return end_failed_gate(attempt, e)
    except TrainingFailed as e:
        return end_failed_training(attempt, e)
    except JanusError as e:
        return _finish(attempt, "FAILED", e)
    except BaseException as e:
        words = f"{type(e).__name__}: {e}"
        attempt.ledger.end("FAILED", 1, words)
        attempt.status.finish("FAILED", 1, reason=words)
        raise
    attempt.ledger.end("COMPLETED", 0, None)
    attempt.status.finish("COMPLETED", 0)
    say(f"attempt {attempt.number}: completed")
    return 0


def require_progress(attempt: Attempt) -> None:
    """Nothing, while attempts get anywhere: Slurm itself queues a job again for ever. Raises: JanusError."""
    earlier, limit = attempt.ledger.earlier_without_progress(), attempt.resolved.job.restart.max_without_progress
    if earlier.count >= limit:
        raise JanusError(
            f"{earlier.count} attempts in a row ended without a checkpoint after step {attempt.ledger.from_step} "
            f"(restart.max_without_progress: {limit}); the last one: {earlier.last_words or 'no word'}",
            hint=f"janus-cluster status {attempt.run.name}; when it is mended: janus-cluster resume {attempt.run.name}",
        )


def end_stopped(attempt: Attempt, error: StoppedOnPurpose) -> int:
    """The job is in the queue again, where it is to go on; else it was stopped or cancelled."""
    if attempt.stop.first in (signal.SIGTERM, signal.SIGINT):
        # A cancelled job must not come back. Of a requeue or a preemption, which also say SIGTERM, Slurm takes care.
        failure = find_failure(attempt, error, state="CANCELLED")
        return _finish(attempt, "CANCELLED", error, describe_failure(failure) if failure.kind in BY_SLURM else None)
    if attempt.resolved.job.restart.on_stop == "end":
        return _finish(attempt, "STOPPED", error, "restart.on_stop: end")
    # STOPPED may begin again, so nobody takes the next word for the last one while the requeue is under way.
    attempt.status.update(state="STOPPED", reason=error.message, exit_code=error.exit_code)
    attempt.ledger.end("STOPPED", error.exit_code, error.message)
    say(error.message)
    refusal = attempt.launcher.requeue()
    words = "queued again" if refusal is None else f"not queued again: {refusal}"
    return _finish(attempt, "STOPPED", error, words)


def end_failed_gate(attempt: Attempt, error: GateFailed) -> int:
    """The job is queued again without the bad node, where it asks for that and it can be; else it has failed."""
    # STOPPED may begin again, so nobody takes the next word for the last one while the requeue is under way.
    attempt.status.update(state="STOPPED", reason=error.message, exit_code=error.exit_code)
    is_queued, words = queue_again_without_bad_nodes(attempt)
    return _finish(attempt, "STOPPED" if is_queued else "FAILED", error, words)


def end_failed_training(attempt: Attempt, error: TrainingFailed) -> int | None:
    """One more attempt in this allocation, where restart.on_failure and the fault say so; else the job has failed.

    An attempt that ran out of memory before it had completed a step is followed by one with the next option of
    training.memory: auto, whatever restart.on_failure says. Later, what ran out depends on the data.
    """
    policy, failure = attempt.resolved.job.restart, find_failure(attempt, error)
    words = describe_failure(failure)
    if (memory := attempt.resolved.memory) is not None and is_out_of_memory(failure, attempt.resolved):
        if has_stepped(attempt.run, attempt=attempt.number, world_size=attempt.resolved.world_size):
            say("memory: it ran out after a step was done, so no smaller option is taken by itself")
        elif memory.next_option is None:
            return _finish(attempt, "FAILED", error, f"{words}; the last option of training.memory: auto")
        else:
            try_smaller(attempt, error, words)
            return None
    is_to_go_on = policy.on_failure == "always" or (policy.on_failure == "transient" and failure.kind in TRANSIENT)
    gained = newest_step(attempt.run) > attempt.ledger.from_step
    tried = 0 if gained else attempt.ledger.earlier_without_progress().count + 1
    if not is_to_go_on or tried >= policy.max_without_progress:
        why = f"restart.on_failure: {policy.on_failure}" if not is_to_go_on else f"{tried} attempts got no further"
        say(f"training failed: {words} ({why})")
        return _finish(attempt, "FAILED", error)
    attempt.ledger.end("FAILED", error.exit_code, words)
    say(f"attempt {attempt.number} failed: {words}; one more attempt in the same allocation")
    return None


def try_smaller(attempt: Attempt, error: TrainingFailed, words: str) -> None:
    """The run folder holds the next option of training.memory: auto, and says why."""
    because = f"attempt {attempt.number} ({describe_taken(attempt.resolved)}) ran out of memory before its first step"
    after = take_next_option(attempt.run, attempt.resolved, because=because)
    attempt.ledger.end("FAILED", error.exit_code, f"{words}; on with {describe_taken(after)} (training.memory: auto)")
    say(f"attempt {attempt.number} failed: {words}")
    say(f"memory: one more attempt in the same allocation with {describe_taken(after)}; the effective batch stays")


def _finish(attempt: Attempt, state: str, error: JanusError, note: str | None = None) -> int:
    reason = f"{error.message}; {note}" if note else error.message
    attempt.ledger.end(state, error.exit_code, reason)
    attempt.status.finish(state, error.exit_code, reason=reason, signal=attempt.stop.first)
    say(f"ended: {reason}" + (f"\nnext: {error.hint}" if error.hint else ""))
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
    stamp_output()
    run = RunDir(args.run_dir)
    try:
        resolved = ResolvedJob.load(run.resolved_json.read_text(encoding="utf-8"))
        code = run_job(run, build_launcher(args.launcher, resolved, os.environ))
    except JanusError as e:
        say(f"ended: {e.message}" + (f"\nnext: {e.hint}" if e.hint else ""))
        code = e.exit_code
    sys.exit(code)


if __name__ == "__main__":
    main()
