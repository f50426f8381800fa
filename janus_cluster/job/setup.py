"""environment.setup: what is doubtful about its lines, and what to add after one failed. Pure functions."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import PurePosixPath

# A line that brings a Python of its own; the group names the environment: a prefix for `activate`, else a name.
_ACTIVATES = (
    re.compile(r"(?:^|[;&|]\s*)(?:source|\.)\s+[\"']?(?P<prefix>\S+?)/bin/activate\b(?!\s+\S)"),
    re.compile(r"(?:^|[;&|]\s*)(?:conda|mamba|micromamba)\s+activate\s+(?P<name>\S+)"),
    re.compile(r"(?:^|[;&|]\s*)(?:source|\.)\s+\S*/?activate\s+(?P<name>[\w.-]+)"),
    re.compile(r"(?:^|[;&|]\s*)pyenv\s+(?:activate|shell)\s+(?P<name>\S+)"),
    re.compile(r"(?:^|[;&|]\s*)spack\s+(?:load|env\s+activate)\s+\S*(?:py-|python|torch)\S*"),
    re.compile(r"(?:^|[;&|]\s*)(?:module|ml)\s+(?:load\s+)?\S*(?:python|conda|miniforge|pytorch)\S*", re.IGNORECASE),
)
# As job.sbatch reports it.
_FAILED = re.compile(r"environment\.(?P<key>setup\w*): exit code (?P<code>\d+) of: (?P<command>\S+)(?P<rest>.*)")
_ADD = {
    "module": "source /etc/profile.d/modules.sh   # or lmod.sh, z00_lmod.sh there",
    "conda": "source PREFIX/etc/profile.d/conda.sh   # PREFIX: conda info --base",
    "micromamba": 'eval "$(micromamba shell hook --shell bash)"',
}
_ADD |= {"ml": _ADD["module"], "mamba": _ADD["conda"]}


def warn_of_interpreter(setup: Sequence[str], *, python: str, is_own: bool) -> list[str]:
    """A warning where setup activates an environment and the job runs another interpreter, the one that submits.

    `is_own`: the job names its interpreter.
    """
    if is_own:
        return []
    line = next((line for line in setup if _brings_another_python(line, python)), None)
    if line is None:
        return []
    return [
        f"environment.setup has {line!r}, but the job runs the interpreter that submits, {python}; "
        "--set environment.python=python takes the one that setup brings"
    ]


def _brings_another_python(line: str, python: str) -> bool:
    found = next((m for pattern in _ACTIVATES if (m := pattern.search(line.strip()))), None)
    if found is None:
        return False
    groups, own = found.groupdict(), PurePosixPath(python).parent.parent
    if prefix := groups.get("prefix"):
        return str(own) != prefix
    return own.name != groups.get("name")


def advise_on_setup(message: str) -> str | None:
    """What to do about a line of environment.setup that ended the job; None for another message."""
    found = _FAILED.search(message)
    if found is None:
        return None
    command = found["command"]
    is_unknown = found["code"] == "127" or (command in ("conda", "mamba") and found["rest"].split()[:1] == ["activate"])
    if is_unknown and command in _ADD:
        return f"add a line before it in environment.{found['key']}: {_ADD[command]}"
    if found["code"] == "127":
        return f"{command} is no command on that node: correct the line, or add one before it that brings it"
    return f"try it in a shell on that node, then correct the line: {command}{found['rest']}"
