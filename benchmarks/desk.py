"""What looking at runs costs, and what it costs the controller: python -m benchmarks.desk [--small]

tail    time to the first line of a log of 1 GB, as a ratio to one of 1 MB, from its end and with --since; peak memory
        (VmHWM); CPU time of a minute in which nothing happens, of 100,000 new lines; squeue calls in a minute
status  questions to Slurm and CPU time, as a ratio to `python -c pass`, for 1 run and for 50; a second call right after

The runs are of two nodes with 8 ranks each, whose logs this program writes. `squeue`, `scontrol` and `sacct` are
programs on PATH that count their calls and answer RUNNING: what a controller's own work costs is not in here.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from janus_cluster.rundir import RunDir, write_json_atomically
from janus_cluster.stamped import render_stamp

PAIRS = 7
RANKS_PER_NODE, NODES = 8, ("h800-01", "h800-02")
_MB = 1_000_000
_BLOCK_BYTES = 100_000
_LIMIT_S = 240.0
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_LINE = "one more line of what a rank says while it works, as long as they usually are"


@dataclass(frozen=True)
class Desk:
    """A folder with runs of one user, and a Slurm that counts how often it is asked."""

    path: Path

    @property
    def environ(self) -> dict[str, str]:
        path = f"{self.path / 'bin'}{os.pathsep}{os.environ['PATH']}"
        return os.environ | {"JANUS_HOME": str(self.path), "PATH": path, "PYTHONPATH": str(Path.cwd())}

    def count_calls(self) -> int:
        """How often Slurm was asked since the last look."""
        calls = self.path / "calls"
        count = len(calls.read_text()) if calls.exists() else 0
        calls.unlink(missing_ok=True)
        return count

    def forget(self) -> None:
        """What Slurm said before is kept no longer."""
        for kept in self.path.rglob("slurm_answers*.json"):
            kept.unlink()


def build_desk(path: Path) -> Desk:
    """A desk without runs."""
    (path / "bin").mkdir(parents=True)
    (path / "rows").write_text("")
    for name in ("squeue", "scontrol", "sacct"):
        program = path / "bin" / name
        answer = f"cat {path / 'rows'}" if name == "squeue" else "exit 1"
        program.write_text(f"#!/bin/sh\nprintf x >> {path / 'calls'}\n{answer}\n")
        program.chmod(0o755)
    return Desk(path)


def add_run(desk: Desk, job_id: int) -> RunDir:
    """A run that Slurm says is running, with a log for each of its nodes and ranks."""
    run = RunDir(desk.path / "runs" / f"desk-20261121T{job_id:06d}Z-{job_id:04x}")
    run.path.mkdir(parents=True)
    run.begin_attempt()
    now = time.time()
    write_json_atomically(run.submission_json, {"cluster": "slurm", "job_id": str(job_id), "submitted_at": now})
    status = {"cluster": "slurm", "job_id": str(job_id), "attempt": 1, "nodes": list(NODES), "state": "RUNNING"}
    write_json_atomically(run.status_json, status | {"phase": "training", "started_at": now, "updated_at": now})
    run.batch_log.write_text(f"{render_stamp(now)} attempt 1 of {run.name}: job {job_id}\n")
    for path in rank_logs(run):
        path.write_text(f"{render_stamp(now)} rank\n")
    row = [str(job_id), "RUNNING", "0", "0", ",".join(NODES), f"{now:.0f}", f"{now:.0f}", "None"]
    with (desk.path / "rows").open("a") as rows:
        rows.write("\x1f".join([*row, str(run.job_sbatch), "desk", ""]) + "\n")
    return run


def rank_logs(run: RunDir) -> list[Path]:
    """The log of every rank."""
    return [
        run.rank_log(1, node, n * RANKS_PER_NODE + r) for n, node in enumerate(NODES) for r in range(RANKS_PER_NODE)
    ]


def write_log(path: Path, *, size_bytes: int, seconds: float) -> None:
    """The log has that size; its lines' times begin `seconds` ago and end a minute ago."""
    mark = "2000-01-01T00:00:00.000Z"
    block = "".join(f"{mark} {_LINE} {i}\n" for i in range(_BLOCK_BYTES // (len(mark) + len(_LINE) + 7))).encode()
    num_blocks = max(1, size_bytes // len(block))
    ended = time.time() - 60
    with path.open("wb") as log:
        for i in range(1, num_blocks + 1):
            when = ended - (seconds - 60) * (1 - i / num_blocks)
            log.write(block.replace(mark.encode(), render_stamp(when).encode()))


@contextmanager
def following(desk: Desk, run: RunDir, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    """`janus-cluster tail` of the run, until the block ends."""
    janus = str(Path(sys.executable).with_name("janus-cluster"))
    argv = [janus, "tail", str(run.path), *options]
    with subprocess.Popen(argv, env=desk.environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        too_long = threading.Timer(_LIMIT_S, process.kill)
        too_long.start()
        try:
            yield process
        finally:
            too_long.cancel()
            process.kill()


def time_to_first_line(desk: Desk, run: RunDir, *options: str) -> tuple[float, float, int]:
    """(seconds, peak memory in MB, bytes that were read of files) until the first line of the log came."""
    begun = time.perf_counter()
    with following(desk, run, *options) as process:
        read_until(process, _LINE)
        seconds = time.perf_counter() - begun
        return seconds, peak_mb(process.pid), bytes_read(process.pid)


def read_until(process: subprocess.Popen[bytes], text: str) -> None:
    """The process has printed a line with that text."""
    assert process.stdout is not None
    while text.encode() not in (line := process.stdout.readline()):
        assert line, "tail has ended"


def peak_mb(pid: int) -> float:
    """The most memory that the process has had. Units: MB of 1e6 bytes."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / _MB for line in lines if line.startswith("VmHWM"))


def bytes_read(pid: int) -> int:
    """What the process has read so far, from files and pipes."""
    return int(Path(f"/proc/{pid}/io").read_text().split()[1])


def cpu_s(pid: int) -> float:
    """CPU seconds of the process and of those of its children that have ended."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(int(n) for n in fields[11:15]) / _TICKS_PER_S


def measure_opening(desk: Desk, *, large_bytes: int) -> None:
    """Prints what the size of a log costs, pair by pair, so that a drifting machine cancels out."""
    runs = [add_run(desk, 1), add_run(desk, 2)]
    for run, size_bytes in zip(runs, (_MB, large_bytes), strict=True):
        write_log(rank_logs(run)[0], size_bytes=size_bytes, seconds=36_000)
    title = f"tail, first line of {size(large_bytes)}"
    print(f"{title:<44} {'median':>9}  {'ratio to 1 MB':>14}  {'peak':>8}  {'read':>8}")
    for label, options in {"from the end": (), "--since 5m": ("--since", "5m")}.items():
        time_to_first_line(desk, runs[1], *options)
        pairs = [[time_to_first_line(desk, run, *options) for run in runs] for _ in range(PAIRS)]
        ratio = statistics.median(large[0] / small[0] for small, large in pairs)
        seconds, memory_mb, read = (statistics.median(large[i] for _, large in pairs) for i in range(3))
        print(f"  {label:<42} {seconds * 1000:6.0f} ms  {ratio:14.2f}  {memory_mb:5.0f} MB  {read / _MB:5.1f} MB")


def measure_following(desk: Desk, *, minute_s: float, num_lines: int) -> None:
    """Prints what a minute without news costs, and what news cost."""
    run = add_run(desk, 3)
    desk.forget()
    desk.count_calls()
    with following(desk, run) as process:
        read_until(process, "RUNNING")
        before = cpu_s(process.pid)
        time.sleep(minute_s)
        idle_s = (cpu_s(process.pid) - before) * 60 / minute_s
        calls = desk.count_calls()
        print(f"{'tail, a minute without news, 17 logs':<44} {idle_s:6.2f} s CPU, {calls} squeue in {minute_s:.0f} s")
        logs = rank_logs(run)
        before = cpu_s(process.pid)
        begun = time.perf_counter()
        for i, path in enumerate(logs):
            lines = (f"{render_stamp(time.time())} {_LINE} {i} {n}\n" for n in range(num_lines // len(logs)))
            with path.open("a") as log:
                log.writelines(lines)
        with run.batch_log.open("a") as log:
            log.write(f"{render_stamp(time.time() + 1)} the last of all\n")
        read_until(process, "the last of all")
        per_100k = (cpu_s(process.pid) - before) * 100_000 / num_lines
        wall_s = time.perf_counter() - begun
        print(
            f"{'tail, 100,000 new lines of 16 ranks':<44} {per_100k:6.2f} s CPU, shown after {wall_s:.1f} s, "
            f"peak {peak_mb(process.pid):.0f} MB"
        )


def measure_status(desk: Desk, counts: Sequence[int]) -> None:
    """Prints what `status` costs for so many runs."""
    janus = str(Path(sys.executable).with_name("janus-cluster"))
    print(f"{'status':<44} {'median':>9}  ratio to `python -c pass` (CPU)  questions to Slurm, the next call")
    for count in counts:
        own = build_desk(desk.path / f"status{count}")
        for job_id in range(1, count + 1):
            add_run(own, job_id)
        pairs, calls = [], []
        for _ in range(PAIRS):
            own.forget()
            pass_s = cpu_of([sys.executable, "-c", "pass"], own)
            status_s = cpu_of([janus, "status"], own)
            first = own.count_calls()
            cpu_of([janus, "status"], own)
            calls.append((first, own.count_calls()))
            pairs.append((pass_s, status_s))
        ratio = statistics.median(b / a for a, b in pairs)
        milliseconds = statistics.median(b for _, b in pairs) * 1000
        first, second = max(calls)
        label = f"  {count} run{'s' if count > 1 else ''}"
        print(f"{label:<44} {milliseconds:6.0f} ms  {ratio:30.1f}  {first}, {second}")


def cpu_of(argv: list[str], desk: Desk) -> float:
    """CPU seconds of one run of argv and of what it started."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(argv, env=desk.environ, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def size(num_bytes: int) -> str:
    """`1 GB`, `64 MB`."""
    return f"{num_bytes / 1e9:g} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:g} MB"


def main() -> None:
    """Prints medians, ratios and counts."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.desk", description=__doc__)
    parser.add_argument("--small", action="store_true", help="64 MB and 15 s in the place of 1 GB and a minute")
    small = parser.parse_args().small
    with tempfile.TemporaryDirectory() as name:
        desk = build_desk(Path(name) / "desk")
        measure_opening(desk, large_bytes=64 * _MB if small else 1000 * _MB)
        measure_following(desk, minute_s=16 if small else 61, num_lines=20_000 if small else 100_000)
        measure_status(desk, (1, 50))


if __name__ == "__main__":
    main()
