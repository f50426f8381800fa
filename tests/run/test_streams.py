"""Exit codes and messages where stdout or stderr is closed, full or without a reader, with the real command."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

FULL = (1, "", "error: No space left on device: standard output\n")
# click prints a help, `list --json` two bytes, `config schema` more than one buffer, and rich the table of `plan`.
every_output = pytest.mark.parametrize(
    "argv", [("--help",), ("list", "--json"), ("config", "schema"), ("plan", "demo")], ids=" ".join
)
with_and_without_buffer = pytest.mark.parametrize("unbuffered", ["", "1"], ids=["buffered", "unbuffered"])


def call(home: Path, argv: tuple[str, ...], place: str, *, unbuffered: str = "") -> tuple[int, str, str]:
    """`place` is bash that runs before the command. Returns: exit code, stdout and stderr, as far as it leaves them."""
    environ = os.environ | {"JANUS_HOME": str(home), "PYTHONUNBUFFERED": unbuffered}
    line = ["bash", "-c", f'{place}; exec "$@"', "bash", sys.executable, "-m", "janus_cluster.cli", *argv]
    done = subprocess.run(line, cwd=home, env=environ, capture_output=True, text=True, timeout=600, check=False)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def unread(tmp_path: Path) -> str:
    """A place whose stdout is a pipe without a reader."""
    # Bash opens the pipe for both ends, and closes the end that reads.
    return f"mkfifo {tmp_path}/pipe; exec 3<>{tmp_path}/pipe 4>{tmp_path}/pipe 3<&-; exec >&4 4>&-"


@with_and_without_buffer
@every_output
def test_a_full_stdout_ends_with_1_and_a_line(tmp_path: Path, argv: tuple[str, ...], unbuffered: str) -> None:
    assert call(tmp_path, argv, "exec >/dev/full", unbuffered=unbuffered) == FULL


@with_and_without_buffer
@every_output
def test_a_pipe_without_a_reader_ends_with_141_and_no_line(
    tmp_path: Path, argv: tuple[str, ...], unbuffered: str, unread: str
) -> None:
    assert call(tmp_path, argv, unread, unbuffered=unbuffered) == (141, "", "")


@pytest.mark.parametrize(
    ("place", "why"),
    [("exec 1</dev/null", "Bad file descriptor"), ("ulimit -f 0; exec >file", "File too large")],
)
def test_another_stdout_that_takes_nothing_ends_with_1_and_the_reason(tmp_path: Path, place: str, why: str) -> None:
    assert call(tmp_path, ("list",), place) == (1, "", f"error: {why}: standard output\n")


@with_and_without_buffer
@pytest.mark.parametrize("place", ["exec 2>/dev/full", "exec 2>&-", "exec 2</dev/null"])
def test_a_stderr_that_takes_nothing_leaves_the_exit_code_and_stdout(
    tmp_path: Path, place: str, unbuffered: str
) -> None:
    assert call(tmp_path, ("status", "nope"), place, unbuffered=unbuffered) == (22, "", "")
    assert call(tmp_path, ("list", "--json"), place, unbuffered=unbuffered) == (0, "[]\n", "")


def test_a_stderr_without_a_reader_leaves_the_exit_code(tmp_path: Path, unread: str) -> None:
    assert call(tmp_path, ("status", "nope"), f"exec 5>&1; {unread}; exec 2>&1 >&5 5>&-") == (22, "", "")


def test_with_nothing_to_write_to_the_exit_code_remains(tmp_path: Path) -> None:
    assert call(tmp_path, ("list",), "exec >/dev/full 2>/dev/full") == (1, "", "")
    assert call(tmp_path, ("list",), "exec <&- >&- 2>&-") == (0, "", "")
    assert call(tmp_path, ("status", "nope"), "exec <&- >&- 2>&-") == (22, "", "")


def test_a_full_disk_names_the_file_that_was_being_written(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from janus_cluster.run.files import write_text_atomically\n"
        "try: write_text_atomically(Path('kept.json'), 'text')\n"
        "except OSError as e: sys.exit(str(e))"
    )
    line = ["bash", "-c", 'ulimit -f 0; exec "$@"', "bash", sys.executable, "-c", code]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False)
    assert done.stderr == "[Errno 27] File too large: 'kept.json'\n"
    assert list(tmp_path.iterdir()) == []
