"""Phase index: reads the data as a job of its own on one node; no training."""

from __future__ import annotations

from janus_cluster.errors import UsageError
from janus_cluster.node.batch_log import log_line
from janus_cluster.node.phases import Attempt


def run_index(attempt: Attempt) -> None:
    """Build the data index. Raises: StoppedOnPurpose, UsageError naming the log with the cause."""
    attempt.status.update(phase="index")
    log_line("index: the data is read; no model, no GPU")
    code = attempt.run_phase("index", timeout_s=None, end_together=True)
    if code:
        log = attempt.run.node_log(attempt.number, attempt.launcher.nodes[0])
        last = _last_error(log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else [])
        raise UsageError(f"the index was not made (exit code {code}): {last or log}", hint=f"less {log}")


def _last_error(lines: list[str]) -> str:
    """The line that begins the error, without its time stamp."""
    found = next((line for line in reversed(lines) if "error: " in line), "")
    return found.partition("error: ")[2]
