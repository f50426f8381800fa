"""The job's program on node 0: runs attempts (gate, then training) until one succeeds or a retry cannot help.

    python -m janus_cluster.node.attempt RUN_DIR --bundle N --launcher slurm|local

job.sbatch execs this program. It runs every phase as one step over all nodes, judges between them, and keeps
status.json.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from janus_cluster.errors import GateFailed, JanusError, StoppedOnPurpose, TrainingFailed
from janus_cluster.job.resolved import MemoryOption, ResolvedJob
from janus_cluster.node.batch_log import log_line
from janus_cluster.node.code import check_code
from janus_cluster.node.gate import queue_again_without_bad_nodes, run_gate
from janus_cluster.node.index import run_index
from janus_cluster.node.ledger import Earlier, completed_attempt, newest_step
from janus_cluster.node.lock import run_folder_held
from janus_cluster.node.memory import describe_option, has_stepped, is_out_of_memory, load_when_visible
from janus_cluster.node.phases import Attempt, StopSignals, Superseded
from janus_cluster.node.stall import write_analysis
from janus_cluster.node.steps import Launcher
from janus_cluster.node.training import BY_SLURM, TRANSIENT, find_failure, run_training
from janus_cluster.run.current import follow_fallbacks
from janus_cluster.run.hosts import fold_nodes
from janus_cluster.run.next_command import command_for
from janus_cluster.run.paths import RunDir
from janus_cluster.run.records.attempt import FallbackRecord
from janus_cluster.run.records.failure import FailureRecord
from janus_cluster.run.stamped import stamp_output

# The batch process of a requeued job may still be ending on another node.
_WAIT_FOR_LOCK_S = 60.0


def run_job(run: RunDir, bundle: int, launcher: Launcher) -> int:
    """Run the job to its end and write status.json. Returns: its exit code (table in errors.py).

    `bundle` is the submitted one. On fewer nodes (nodes_min) the bundle for that number runs; an attempt that ran out
    of memory may have chosen a smaller option, a later bundle.

    Raises: UsageError while another job's attempt writes into the run folder; nothing was touched.
    """
    stop = StopSignals()
    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        # job.sbatch asks Slurm for USR1 before the walltime ends.
        signal.signal(signum, lambda number, _frame: stop.note(number))
    if early := os.environ.get("JANUS_STOP_SIGNAL"):
        # job.sbatch received it while the environment was being prepared.
        stop.note(signal.Signals[f"SIG{early}"])
    with run_folder_held(run, job_id=launcher.job_id, wait_s=_WAIT_FOR_LOCK_S):
        if (completed := completed_attempt(run, launcher.job_id)) is not None:
            log_line(f"nothing left to do: attempt {completed} of this job has completed")
            return 0
        submitted = load_when_visible(run, bundle)
        if (fewer := submitted.fewer_nodes.get(len(launcher.nodes))) is not None:
            log_line(f"{len(launcher.nodes)} of {submitted.job.nodes} nodes (nodes_min): {fold_nodes(launcher.nodes)}")
            bundle = fewer
        while True:
            # Looked up anew: an attempt that ran out of memory has recorded which bundle comes next.
            choice = follow_fallbacks(run, bundle)
            resolved = load_when_visible(run, choice.bundle)
            code = run_attempt(Attempt(run, resolved, launcher, stop, because=choice.because))
            if code is not None:
                return code


def run_attempt(attempt: Attempt) -> int | None:
    """Run one attempt. Returns: the job's exit code, or None where one more attempt in this allocation may help."""
    resolved, launcher = attempt.resolved, attempt.launcher
    log_line(f"attempt {attempt.number} of {attempt.run.name}: job {launcher.job_id} on {fold_nodes(launcher.nodes)}")
    if resolved.memory is not None:
        log_line(describe_option(resolved.memory, because=attempt.because))
    try:
        for change in check_code(attempt.run, resolved, attempt=attempt.number):
            log_line(f"warning: {change}")
        require_progress(attempt)
        if resolved.job.preflight.enabled:
            run_gate(attempt)
        else:
            log_line("preflight: skipped (preflight.enabled: false)")
        if resolved.job.kind == "train":
            run_training(attempt)
        elif resolved.job.kind == "index":
            run_index(attempt)
    except Superseded as e:
        # status.json is the other attempt's.
        attempt.ledger.end("FAILED", e.exit_code, e.message)
        log_line(f"ended: {e.message}")
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
        reason = f"{type(e).__name__}: {e}"
        attempt.ledger.end("FAILED", 1, reason, FailureRecord(kind="exception", message=reason, exit_code=1))
        attempt.status.finish("FAILED", 1, reason=reason)
        raise
    attempt.ledger.end("COMPLETED", 0, None)
    attempt.status.finish("COMPLETED", 0)
    log_line(f"attempt {attempt.number}: completed")
    return 0


def require_progress(attempt: Attempt) -> None:
    """Stop a job whose attempts make no progress: Slurm would requeue it without limit. Raises: JanusError."""
    earlier, limit = attempt.ledger.earlier_without_progress(), attempt.resolved.job.restart.max_without_progress
    if earlier.count >= limit:
        raise JanusError(
            f"{earlier.count} attempts in a row made no progress: {_describe_gain(earlier, attempt.ledger.from_step)} "
            f"(restart.max_without_progress: {limit}); the last one: {earlier.last_reason or 'no reason recorded'}",
            hint=f"{command_for('status', attempt.run)}; after the fix: {command_for('resume', attempt.run)}",
        )


def _describe_gain(earlier: Earlier, step: int) -> str:
    if earlier.from_step == step:
        return f"they ended without a checkpoint after step {step}"
    return f"steps {earlier.from_step} to {step} took less than a tenth of their time; a longer slurm.time helps"


def end_stopped(attempt: Attempt, error: StoppedOnPurpose) -> int:
    """Requeue the job where it is to go on; else record that it was stopped or cancelled."""
    if attempt.stop.first in (signal.SIGTERM, signal.SIGINT) or attempt.launcher.is_ended_by_slurm():
        # A cancelled job must not be requeued, also if it was cancelled while the checkpoint of an earlier signal was
        # saved. Slurm handles a requeue or a preemption, which also send SIGTERM.
        failure = find_failure(attempt, error, state="CANCELLED")
        return _finish(attempt, "CANCELLED", error, failure.describe() if failure.kind in BY_SLURM else None)
    if attempt.resolved.job.restart.on_stop == "end":
        return _finish(attempt, "STOPPED", error, "restart.on_stop: end")
    # STOPPED may begin again: readers keep waiting while the requeue is under way.
    attempt.status.update(state="STOPPED", reason=error.message, exit_code=error.exit_code)
    attempt.ledger.end("STOPPED", error.exit_code, error.message)
    log_line(error.message)
    refusal = attempt.launcher.requeue()
    outcome = "queued again" if refusal is None else f"not queued again: {refusal}"
    return _finish(attempt, "STOPPED", error, outcome)


def end_failed_gate(attempt: Attempt, error: GateFailed) -> int:
    """Requeue the job without the bad node, where the job allows that and it is possible; else the job has failed."""
    # STOPPED may begin again: readers keep waiting while the requeue is under way.
    attempt.status.update(state="STOPPED", reason=error.message, exit_code=error.exit_code)
    retry = queue_again_without_bad_nodes(attempt)
    note = retry.message if attempt.resolved.job.preflight.on_fail != "stop" else None
    return _finish(attempt, "STOPPED" if retry.is_queued else "FAILED", error, note)


def end_failed_training(attempt: Attempt, error: TrainingFailed) -> int | None:
    """One more attempt in this allocation, where restart.on_failure and the fault allow it; else the job has failed.

    An attempt that ran out of memory before it had completed a step is followed by one with the next option of
    training.memory: auto, for every value of restart.on_failure. After a step, the data decides what memory is needed.
    """
    policy, failure = attempt.resolved.job.restart, find_failure(attempt, error)
    reason = failure.describe()
    if failure.kind == "nccl_timeout":
        write_analysis(attempt.run, attempt=attempt.number, world_size=attempt.resolved.world_size)
    if (memory := attempt.resolved.memory) is not None and is_out_of_memory(failure, attempt.resolved):
        if has_stepped(attempt.run, attempt=attempt.number, world_size=attempt.resolved.world_size):
            log_line("memory: it ran out after a completed step, so no smaller option is tried")
        elif memory.next_option is None:
            note = f"{reason}; the last option of training.memory: auto"
            return _finish(attempt, "FAILED", error, note, failure)
        else:
            fall_back(attempt, memory.option, memory.next_option, error, failure)
            return None
    if _is_gone(attempt.run.path):
        log_line(f"training failed: {attempt.run.path} is gone, so there is nothing to go on with")
        return _finish(attempt, "FAILED", error, failure=failure)
    is_to_go_on = policy.on_failure == "always" or (policy.on_failure == "transient" and failure.kind in TRANSIENT)
    gained = newest_step(attempt.run) > attempt.ledger.from_step
    tried = 0 if gained else attempt.ledger.earlier_without_progress().count + 1
    if not is_to_go_on or tried >= policy.max_without_progress:
        why = f"restart.on_failure: {policy.on_failure}" if not is_to_go_on else f"{tried} attempts made no progress"
        log_line(f"training failed: {reason} ({why})")
        return _finish(attempt, "FAILED", error, failure=failure)
    attempt.ledger.end("FAILED", error.exit_code, reason, failure)
    log_line(f"attempt {attempt.number} failed: {reason}; one more attempt in the same allocation")
    return None


def _is_gone(folder: Path) -> bool:
    """Whether the folder was moved or removed; a file system that gives no answer is no sign of it."""
    try:
        folder.stat()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return False


def fall_back(
    attempt: Attempt, ran: MemoryOption, smaller: MemoryOption, error: TrainingFailed, failure: FailureRecord
) -> None:
    """Record the bundle of the next attempt, and why, in attempt.json."""
    cause = failure.describe()
    because = f"attempt {attempt.number} ({ran.words}) ran out of memory before its first step"
    following = attempt.resolved.fallback_bundle
    if following is not None:
        attempt.ledger.write(fallback=FallbackRecord(bundle=following, because=because))
    reason = f"{cause}; continues with {smaller.words} (training.memory: auto)"
    attempt.ledger.end("FAILED", error.exit_code, reason, failure)
    log_line(f"attempt {attempt.number} failed: {cause}")
    log_line(f"memory: one more attempt in the same allocation with {smaller.words}; the effective batch stays")


def _finish(
    attempt: Attempt, state: str, error: JanusError, note: str | None = None, failure: FailureRecord | None = None
) -> int:
    reason = f"{error.message}; {note}" if note else error.message
    if failure is None:
        failure = find_failure(attempt, error, state=state, reason=reason)
    attempt.ledger.end(state, error.exit_code, reason, failure)
    attempt.status.finish(state, error.exit_code, reason=reason, signal=attempt.stop.first)
    log_line(f"ended: {reason}" + (f"\nnext: {error.hint}" if error.hint else ""))
    return error.exit_code


def build_launcher(name: str, resolved: ResolvedJob, environ: Mapping[str, str]) -> Launcher:
    """The launcher that job.sbatch named: srun inside an allocation, or processes on this machine."""
    if name == "local":
        from janus_cluster.node.local_launcher import LocalLauncher

        return LocalLauncher(resolved.job.nodes)
    from janus_cluster.node.slurm_launcher import SlurmLauncher

    numbers = {resolved.job.nodes, *resolved.fewer_nodes}
    return SlurmLauncher.of_allocation(
        environ, cluster=resolved.cluster, numbers=numbers, srun_extra=resolved.job.srun_extra
    )


def main(argv: Sequence[str] | None = None) -> None:
    """The attempt has run and the process has ended with the job's exit code."""
    parser = argparse.ArgumentParser(prog="python -m janus_cluster.node.attempt", description=__doc__)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--bundle", type=int, required=True, help="the bundle of the run folder that was submitted")
    parser.add_argument("--launcher", choices=["slurm", "local"], required=True)
    args = parser.parse_args(argv)
    stamp_output()
    run = RunDir(args.run_dir)
    try:
        launcher = build_launcher(args.launcher, load_when_visible(run, args.bundle), os.environ)
        code = run_job(run, args.bundle, launcher)
    except JanusError as e:
        log_line(f"ended: {e.message}" + (f"\nnext: {e.hint}" if e.hint else ""))
        code = e.exit_code
    sys.exit(code)


if __name__ == "__main__":
    main()
