"""What users cost the site: requests to slurmctld and file operations: python -m benchmarks.site_load (root; strace).

On a sandbox of two hosts with one running demo job. Requests are the difference of `sdiag` before and after a command,
without what the daemons send each other and without sdiag's own. File operations are the system calls with a path
(open, stat, rename, …) that strace counts in the command, in all its processes; below the run folder beside it. What
follows a job (`tail`, `status --watch`) is given for a minute of watching; training, for one step of one rank.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from benchmarks.startup import about
from janus_cluster.observe.progress import load_progress
from janus_cluster.run.paths import RunDir
from janus_cluster.sandbox import down, load_info, up

LIMIT_S = 600.0
WATCH_S = 60.0
STEPS = 20
# Sent by slurmd, srun and slurmstepd for the job itself; and sdiag's own.
_NOT_OURS = re.compile(r"MESSAGE_|REQUEST_(COMPLETE|STEP_COMPLETE|STATS_INFO|PING|JOB_STEP_CREATE|COMPLETE_\w+)")
_RPC = re.compile(r"^\s+(\w+)\s*\(\s*\d+\) count:(\d+)", re.MULTILINE)


class Cost(NamedTuple):
    """Of one command, one minute or one step. `requests`: by message type."""

    what: str
    requests: Counter[str]
    file_operations: int
    in_run_folder: int


def count_requests(environ: dict[str, str]) -> Counter[str]:
    """Requests that slurmctld has answered so far, by message type."""
    shown = subprocess.run(["sdiag"], env=environ, capture_output=True, text=True, check=True).stdout
    by_type = shown.partition("statistics by message type")[2].partition("statistics by user")[0]
    return Counter({name: int(count) for name, count in _RPC.findall(by_type) if not _NOT_OURS.match(name)})


def count_operations(trace: Path, run: RunDir | None) -> tuple[int, int]:
    """System calls with a path in strace's output, and those of them below the run folder."""
    lines = [line for line in trace.read_text(errors="replace").splitlines() if "(" in line and "resumed>" not in line]
    below = [line for line in lines if run is not None and str(run.path) in line]
    return len(lines), len(below)


class Site:
    """A sandbox with demo data, on which commands are typed."""

    def __init__(self, home: Path) -> None:
        self.home = home
        info = load_info(home / "sandbox")
        assert info is not None
        self.environ = os.environ | info.env() | {"JANUS_HOME": str(home), "DEMO_DATA": str(home / "demo_data")}

    def command(self, *words: str) -> list[str]:
        return [sys.executable, "-m", "janus_cluster.cli", *words]

    def type(self, *words: str) -> str:
        done = subprocess.run(self.command(*words), env=self.environ, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{words}: {done.stderr}")
        return done.stdout

    def measure(self, what: str, *words: str, run: RunDir | None = None, watch_s: float | None = None) -> Cost:
        """The cost of the command; of one that follows, in its `watch_s` seconds after the first five."""
        trace = self.home / "trace"
        before = count_requests(self.environ)
        strace = ["strace", "-f", "-qq", "-e", "trace=%file", "-o", str(trace), *self.command(*words)]
        with subprocess.Popen(
            strace, env=self.environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        ) as process:
            if watch_s is not None:
                time.sleep(5)
                before, began = count_requests(self.environ), count_operations(trace, run)
                time.sleep(watch_s)
                ended = count_operations(trace, run)
                requests = count_requests(self.environ) - before
                os.killpg(process.pid, signal.SIGKILL)
                return Cost(what, requests, ended[0] - began[0], ended[1] - began[1])
            process.wait(LIMIT_S)
        return Cost(what, count_requests(self.environ) - before, *count_operations(trace, run))


def wait_for_step(run: RunDir, step: int) -> int:
    """The run has logged that step. Returns: the newest one. Ends the benchmark where it does not come."""
    deadline = time.monotonic() + LIMIT_S
    while (progress := load_progress(run)).step is None or progress.step < step:
        if time.monotonic() > deadline:
            raise SystemExit(f"step {step} did not come: {run.path}")
        time.sleep(0.2)
    return progress.step


def measure_step(site: Site, run: RunDir) -> Cost:
    """File operations of rank 0 in a step, the mean of some."""
    rank = next(int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit() and _is_rank_0(entry, run))
    trace = site.home / "trace"
    tracer = subprocess.Popen(["strace", "-f", "-qq", "-e", "trace=%file", "-o", str(trace), "-p", str(rank)])
    try:
        time.sleep(1)
        first, before = wait_for_step(run, 1), count_operations(trace, run)
        last = wait_for_step(run, first + STEPS)
        after = count_operations(trace, run)
    finally:
        tracer.send_signal(signal.SIGINT)
        tracer.wait(30)
    every, below = ((b - a) / (last - first) for a, b in zip(before, after, strict=True))
    return Cost("a training step, rank 0", Counter(), round(every), round(below))


def _is_rank_0(process: Path, run: RunDir) -> bool:
    try:
        command = (process / "cmdline").read_bytes().split(b"\0")
        environ = (process / "environ").read_bytes().split(b"\0")
    except OSError:
        return False
    return b"janus_cluster.training" in command and str(run.path).encode() in command and b"RANK=0" in environ


def measure(home: Path) -> list[Cost]:
    """Every command once, on one running job."""
    site = Site(home)
    steps = ["--set", "training.max_steps=100000", "--set", "training.num_epochs=1000"]
    job = ["submit", "demo", "--cluster", "sandbox", "--no-preflight", *steps]
    run = RunDir(Path(json.loads(site.type(*job, "--json"))["run_dir"]))
    wait_for_step(run, 3)
    return [
        measure_step(site, run),
        site.measure("submit", *job, "--set", "slurm.hold=true", "--name", "held"),
        site.measure("status RUN", "status", run.name, run=run),
        site.measure("list", "list", run=run),
        site.measure("tail RUN, a minute", "tail", run.name, run=run, watch_s=WATCH_S),
        site.measure("status --watch, a minute", "status", run.name, "--watch", run=run, watch_s=WATCH_S),
        site.measure("cancel RUN", "cancel", run.name, "--yes", run=run),
    ]


def render(costs: list[Cost]) -> str:
    """The table."""
    lines = ["| command | requests to slurmctld | of which | file operations | below the run folder |"]
    lines += ["| --- | --- | --- | --- | --- |"]
    for cost in costs:
        kinds = ", ".join(f"{name} {count}" for name, count in cost.requests.most_common())
        cells = (cost.what, cost.requests.total(), kinds or "–", cost.file_operations, cost.in_run_folder)
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.parse_args()
    if shutil.which("strace") is None:
        raise SystemExit("strace is missing: apt-get install strace")
    with tempfile.TemporaryDirectory(prefix="janus-load-") as folder:
        home = Path(folder)
        demo = [sys.executable, "-m", "janus_cluster.janusvln.world.demo", str(home / "demo_data"), "--episodes", "8"]
        subprocess.run([*demo, "--seed", "0"], check=True)
        up(home / "sandbox")
        try:
            costs = measure(home)
        finally:
            down(home / "sandbox")
    print(about("site_load"))
    print(render(costs))


if __name__ == "__main__":
    main()
