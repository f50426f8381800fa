"""Run a command as a child of this process, so that something can be done after it has ended."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from types import FrameType

from janus_cluster.run.parent import end_with_parent


def start_child(command: Sequence[str], environ: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Start the command; it gets the stop signals that this process does not ignore, and ends with this process."""
    parent = os.getpid()
    # Safe between fork and exec: this process has no other thread.
    process = subprocess.Popen(list(command), env=dict(environ), preexec_fn=lambda: end_with_parent(parent))  # noqa: PLW1509

    def pass_on(signum: int, _frame: FrameType | None) -> None:
        process.send_signal(signum)

    for signum in (signal.SIGTERM, signal.SIGINT):
        if signal.getsignal(signum) is not signal.SIG_IGN:
            signal.signal(signum, pass_on)
    return process


def exit_code(code: int) -> int:
    """A child's return code as a shell has it: 128 + n for signal n."""
    return code if code >= 0 else 128 - code
