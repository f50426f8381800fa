"""`tail --since 10m` on a log of 500 MB, against `wc -l` of it: python -m benchmarks.old_log

Lines as ranks write them, a day of them; and the same bytes without a time, as a library prints them. The file is in
the page cache for both. Target: at most 5.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.startup import about, measure
from janus_cluster.run.files import write_json_atomically
from janus_cluster.run.paths import RunDir

BYTES = 500_000_000
ROUNDS = 5
TEXT = "step {n} loss 2.4375 lr 1.0e-05 grad_norm 1.25 step_time_s 5.01 samples_per_s 12.8"


def dated_lines(now: float) -> Iterator[bytes]:
    """A day of lines up to now."""
    length = len(TEXT) + 26
    count = BYTES // length
    for n in range(count):
        at = now - 86400 * (1 - n / count)
        yield f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(at))}.000Z {TEXT.format(n=n)}\n".encode()


def bare_lines(_now: float) -> Iterator[bytes]:
    line = (TEXT.format(n=7) + "\n").encode()
    for _ in range(BYTES // len(line)):
        yield line


def make_run(home: Path, name: str, lines: Iterator[bytes]) -> RunDir:
    """A run that has ended, with one log."""
    run = RunDir(home / "runs" / name)
    run.bundle(1).path.mkdir(parents=True)
    run.begin_attempt()
    write_json_atomically(run.bundle(1).resolved_json, {"job": {"name": name}})
    job = {"cluster": "local", "job_id": "local-999999999"}
    write_json_atomically(run.submission_json, job | {"submitted_at": time.time() - 86400})
    word = job | {
        "attempt": 1,
        "nodes": ["n1"],
        "state": "COMPLETED",
        "exit_code": 0,
        "started_at": time.time() - 86400,
    }
    write_json_atomically(run.status_json, word | {"updated_at": time.time()})
    with run.rank_log(1, "n1", 0).open("wb") as log:
        log.writelines(lines)
    return run


def main() -> None:
    """Prints seconds of both and the median of the ratios taken pair by pair."""
    janus = str(Path(sys.executable).with_name("janus-cluster"))
    print(about("old_log"))
    print(f"{'log of 500 MB':<18} {'tail s':>7} {'wc s':>6}  ratio, median of {ROUNDS} pairs (range); target 5")
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        environ = os.environ | {"JANUS_HOME": name}
        for label, lines in (("lines with a time", dated_lines), ("lines without", bare_lines)):
            run = make_run(home, label.replace(" ", "-"), lines(time.time()))
            log = str(run.rank_log(1, "n1", 0))
            tail = [janus, "tail", str(run.path), "--no-follow", "--since", "10m"]
            subprocess.run(["wc", "-l", log], check=True, capture_output=True)
            pairs = [
                (measure(["wc", "-l", log], cwd=home, environ=environ), measure(tail, cwd=home, environ=environ))
                for _ in range(ROUNDS)
            ]
            ratios = sorted(b / a for a, b in pairs)
            wc_s, tail_s = (statistics.median(p[i] for p in pairs) for i in (0, 1))
            print(
                f"{label:<18} {tail_s:7.2f} {wc_s:6.2f}  {statistics.median(ratios):.1f} "
                f"({ratios[0]:.1f}–{ratios[-1]:.1f})"
            )
            Path(log).unlink()


if __name__ == "__main__":
    main()
