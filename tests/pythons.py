"""Run tests on every supported Python of this machine, each in a venv without torch: `make test-pythons`.

    python tests/pythons.py [3.10 3.13 | ends] [-- pytest's arguments]

Without a version all are tried; `ends` is the oldest and the newest that are found. Exits with 1 if the tests fail on
any of them, or if fewer than two are tested. Environments (versions: requirements/locked.txt) and logs are under
.cache/pythons.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".cache" / "pythons"
VERSIONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
# A pyenv shim runs only where its version is chosen, and Debian's Python makes a venv only with python3-venv.
PROBE = "import sys, ensurepip, venv; print('%d.%d' % sys.version_info[:2], '%d.%d.%d' % sys.version_info[:3])"
TIMEOUT_S = 1800


def main(arguments: Sequence[str]) -> int:
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    wanted, pytest_arguments = list(arguments[:cut]), list(arguments[cut + 1 :])
    unknown = [w for w in wanted if w not in (*VERSIONS, "ends")]
    if unknown:
        print(f"error: {unknown[0]} is not among {', '.join(VERSIONS)}, ends")
        return 2
    found = {v: p for v in VERSIONS if (p := find_python(v))}
    for version in VERSIONS:
        print(f"{version}: {found.get(version, 'not found')}", flush=True)
    if "ends" in wanted:
        wanted = [*found][:1] + [*found][-1:]
    chosen = {v: p for v, p in found.items() if not wanted or v in wanted}
    results = [run_tests(version, python, pytest_arguments) for version, python in chosen.items()]
    if len(chosen) < 2:
        print("error: fewer than two Pythons were tested\nnext:  pyenv install 3.10 3.13; apt-get install python3-venv")
        return 1
    return 0 if all(results) else 1


def find_python(version: str) -> Path | None:
    """The first Python of that version that can make a venv: on PATH, in pyenv's folder, or the system's."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    folders = [Path(f) for f in os.environ.get("PATH", "").split(":") if f]
    folders += [*sorted(pyenv.glob(f"versions/{version}.*/bin")), Path("/usr/local/bin"), Path("/usr/bin")]
    for python in (folder / f"python{version}" for folder in folders):
        if os.access(python, os.X_OK):
            done = subprocess.run([python, "-c", PROBE], capture_output=True, text=True, timeout=600, check=False)
            if done.stdout.split()[:1] == [version]:
                return python
    return None


def run_tests(version: str, python: Path, pytest_arguments: Sequence[str]) -> bool:
    """The tests have run, their output is in a log, and one line has the result. Returns: whether they passed."""
    venv, log = CACHE / version, CACHE / f"{version}.log"
    CACHE.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    with log.open("w") as out:
        tests = [venv / "bin/python", "-m", "pytest", "-q", "-p", "no:cacheprovider", *pytest_arguments]
        passed = install(venv, python, out) and is_done(tests, out)
    lines = log.read_text(errors="replace").splitlines() or ["no output"]
    if not passed:
        print("\n".join(lines[-40:]), f"the whole log: {log}", sep="\n")
    word = "passed" if passed else "FAILED"
    print(f"{version}: {word} in {time.monotonic() - began:.0f} s: {lines[-1].strip(' =')}", flush=True)
    return passed


def install(venv: Path, python: Path, out: TextIO) -> bool:
    """`venv` has the package and the tools of its tests, made anew if what it was made from has changed."""
    locked = (ROOT / "requirements" / "locked.txt").read_text().splitlines()
    # Without hashes: pip could check this checkout against none.
    pins = "".join(line.rstrip(" \\") + "\n" for line in locked if line[:1].isalnum())
    made_from = f"{python}\n{(ROOT / 'pyproject.toml').read_text()}\n{pins}"
    stamp, constraints = venv / ".made_from", venv / "pins.txt"
    if stamp.exists() and stamp.read_text() == made_from:
        return True
    if not is_done([python, "-m", "venv", "--clear", venv], out):
        return False
    constraints.write_text(pins)
    # What the `train` extra adds, torch first of all, is missing on login nodes.
    pip = [venv / "bin/python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    if not is_done([*pip, "--constraint", constraints, "--editable", ".[dev]"], out):
        return False
    stamp.write_text(made_from)
    return True


def is_done(command: Sequence[str | Path], out: TextIO) -> bool:
    """Whether `command` ended with 0; what it printed is in `out`."""
    try:
        return subprocess.run(command, cwd=ROOT, stdout=out, stderr=out, timeout=TIMEOUT_S, check=False).returncode == 0
    except subprocess.TimeoutExpired:
        print(f"not done after {TIMEOUT_S} s: {' '.join(map(str, command))}", file=out, flush=True)
        return False


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
