"""A terminal as a person has one: tmux runs a shell, keys are typed, the screen is read."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path


class Terminal:
    """One shell in a tmux server of its own. A context: afterwards nothing of it runs."""

    def __init__(self, folder: Path, environ: Mapping[str, str], *, columns: int = 140, rows: int = 48) -> None:
        self.columns = columns
        self._tmux = ("tmux", "-S", str(folder / "tmux"), "-f", "/dev/null")
        self._folder = folder
        self._environ = dict(environ) | {"PS1": "$ ", "TERM": "xterm-256color"}
        self._size = ("-x", str(columns), "-y", str(rows))

    def __enter__(self) -> Terminal:
        shell = ("bash", "--norc", "--noprofile", "-i")
        self._call("new-session", "-d", *self._size, "-c", str(self._folder), *shell)
        self._call("set-option", "-g", "history-limit", "50000")
        self.wait_for(r"^\$")
        return self

    def __exit__(self, *_: object) -> None:
        self._call("kill-server")

    def type(self, line: str) -> None:
        """The line is typed, and Enter."""
        self._call("send-keys", "-l", line)
        self._call("send-keys", "Enter")

    def press(self, key: str) -> None:
        """One key by its name in tmux, as C-c."""
        self._call("send-keys", key)

    def screen(self, *, with_colours: bool = False) -> str:
        """What is to be seen now."""
        return self._call("capture-pane", "-p", *(["-e"] if with_colours else []))

    def scrollback(self, *, with_colours: bool = False) -> str:
        """All that has been on the screen, lines that the terminal wrapped joined again."""
        return self._call("capture-pane", "-p", "-J", "-S", "-", *(["-e"] if with_colours else []))

    def wait_for(self, pattern: str, *, limit_s: float = 600) -> re.Match[str]:
        """The first place on the screen, from its top, where that regular expression is found; ^ and $ are of lines."""
        return self._wait(self.screen, pattern, limit_s)

    def wait_for_line(self, pattern: str, *, limit_s: float = 600) -> re.Match[str]:
        """The same in all that has been on the screen."""
        return self._wait(self.scrollback, pattern, limit_s)

    def _wait(self, look: Callable[[], str], pattern: str, limit_s: float) -> re.Match[str]:
        deadline = time.monotonic() + limit_s
        while (found := re.search(pattern, look(), re.MULTILINE)) is None:
            assert time.monotonic() < deadline, f"not seen: {pattern}\n{self.scrollback()[-6000:]}"
            time.sleep(0.1)
        return found

    def _call(self, *argv: str) -> str:
        done = subprocess.run(
            [*self._tmux, *argv], env=self._environ, capture_output=True, text=True, check=True, timeout=600
        )
        return done.stdout
