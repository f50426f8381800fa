"""What the command line costs, as a ratio to `python -c pass` in the same run: python -m benchmarks.startup

Budget on the developers' 2-core machine: `--help` 150 ms, `submit --dry-run` 400 ms.
"""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RUNS = 11


def measure(argv: list[str], *, cwd: Path, environ: dict[str, str]) -> float:
    """Wall seconds of one run of argv."""
    begun = time.perf_counter()
    subprocess.run(argv, cwd=cwd, env=environ, check=True, capture_output=True)
    return time.perf_counter() - begun


def about(benchmark: str) -> str:
    """One line: when, on what, beside how much other work."""
    cores, load = len(os.sched_getaffinity(0)), os.getloadavg()[0]
    today, version = time.strftime("%Y-%m-%d", time.gmtime()), platform.python_version()
    machine = f"{cores} cores ({platform.machine()}), load {load:.1f}, Python {version}"
    return f"{today}, {machine}: python -m benchmarks.{benchmark}"


def main() -> None:
    """Prints median times, and the median of ratios taken pair by pair, so that a drifting machine cancels out."""
    janus = str(Path(sys.executable).with_name("janus-cluster"))
    commands = {
        "janus-cluster --help": [janus, "--help"],
        "janus-cluster submit demo --dry-run": [janus, "submit", "demo", "--dry-run"],
    }
    with tempfile.TemporaryDirectory() as name:
        cwd = Path(name)
        (cwd / "demo_data").mkdir()
        environ = os.environ | {"JANUS_HOME": name}
        print(about("startup"))
        print(f"{'command':<38} {'median':>9}  ratio to `python -c pass`, median of {RUNS} pairs")
        for label, argv in commands.items():
            measure(argv, cwd=cwd, environ=environ)
            pairs = [
                (
                    measure([sys.executable, "-c", "pass"], cwd=cwd, environ=environ),
                    measure(argv, cwd=cwd, environ=environ),
                )
                for _ in range(RUNS)
            ]
            ratio = statistics.median(b / a for a, b in pairs)
            print(f"{label:<38} {statistics.median(b for _, b in pairs) * 1000:7.0f} ms  {ratio:.1f}")


if __name__ == "__main__":
    main()
