"""Run a program of the node that may be missing, broken or hung; the call always returns."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass

_MOST_BYTES = 4_000_000  # nvidia-smi -q of eight GPUs is 75 kB
_KILL_WAIT_S = 1.0
# ibstat is in /usr/sbin on Debian, which is not on a user's PATH there.
_ALSO_IN = ("/usr/sbin", "/sbin")


@dataclass(frozen=True, kw_only=True)
class CommandOutput:
    """Output of a program. `error`: why there is none (not on PATH, no answer in time); then `rc` is None.

    `is_cut`: there was more output than is kept.
    """

    program: str
    rc: int | None
    stdout: str
    stderr: str
    error: str | None
    duration_s: float
    is_cut: bool = False

    @property
    def problem(self) -> str | None:
        """Why the output may be incomplete: the error, or a bad exit code with the output's beginning."""
        if self.error is not None:
            return self.error
        if self.rc == 0:
            return f"{self.program} printed more than is read" if self.is_cut else None
        output = " ".join((self.stderr.strip() or self.stdout.strip()).split())
        return f"{self.program} ended with {self.rc}" + (f": {output[:200]}" if output else "")


def run_command(argv: Sequence[str], *, timeout_s: float, most_bytes: int = _MOST_BYTES) -> CommandOutput:
    """The program has ended, or was killed with all its children, or is left behind because nothing ends it.

    Output goes through files: a pipe would be waited for as long as any orphan holds it, and a process in state D
    (nvidia-smi on a broken GPU) cannot be waited for at all.
    """
    program = argv[0]
    path = os.pathsep.join([os.environ.get("PATH") or os.defpath, *_ALSO_IN])
    begun = time.monotonic()
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        try:
            process = subprocess.Popen(
                list(argv),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env=os.environ | {"PATH": path, "LC_ALL": "C", "LANGUAGE": "C"},
                start_new_session=True,
            )
        except FileNotFoundError:
            return _silent(program, f"{program} is not on PATH", begun)
        except OSError as e:
            return _silent(program, f"{program} cannot be run: {e.strerror}", begun)
        try:
            rc = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            _kill_group(process)
            return _silent(program, f"{program} did not answer within {timeout_s:g} s", begun)
        texts, is_cut = [], False
        for file in (out, err):
            file.seek(0)
            texts.append(file.read(most_bytes).decode("utf-8", errors="replace"))
            is_cut = is_cut or file.read(1) != b""
    return CommandOutput(
        program=program,
        rc=rc,
        stdout=texts[0],
        stderr=texts[1],
        error=None,
        duration_s=time.monotonic() - begun,
        is_cut=is_cut,
    )


def _silent(program: str, error: str, begun: float) -> CommandOutput:
    return CommandOutput(
        program=program, rc=None, stdout="", stderr="", error=error, duration_s=time.monotonic() - begun
    )


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL at once: a program that did not answer in time may ignore SIGTERM."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_KILL_WAIT_S)
