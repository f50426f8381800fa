"""Run a program of the node that may be missing, broken or hung, and always come back."""

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
# ibstat lies in /usr/sbin on Debian, which is not on a user's PATH there.
_ALSO_IN = ("/usr/sbin", "/sbin")


@dataclass(frozen=True, kw_only=True)
class CommandOutput:
    """What a program said. `error` says why it said nothing: not on PATH, no answer in time; then `rc` is None."""

    program: str
    rc: int | None
    stdout: str
    stderr: str
    error: str | None
    duration_s: float

    @property
    def problem(self) -> str | None:
        """Why the output is not to be trusted as whole: the error, or a bad exit code with its first words."""
        if self.error is not None:
            return self.error
        if self.rc == 0:
            return None
        said = " ".join((self.stderr.strip() or self.stdout.strip()).split())
        return f"{self.program} ended with {self.rc}" + (f": {said[:200]}" if said else "")


def run_command(argv: Sequence[str], *, timeout_s: float) -> CommandOutput:
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
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read(_MOST_BYTES).decode("utf-8", errors="replace"))
    return CommandOutput(
        program=program, rc=rc, stdout=texts[0], stderr=texts[1], error=None, duration_s=time.monotonic() - begun
    )


def _silent(program: str, error: str, begun: float) -> CommandOutput:
    return CommandOutput(
        program=program, rc=None, stdout="", stderr="", error=error, duration_s=time.monotonic() - begun
    )


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL at once: what did not answer in time is not asked politely, because SIGTERM can be ignored."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_KILL_WAIT_S)
