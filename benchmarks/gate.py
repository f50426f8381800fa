"""What the gate costs on eight nodes against two: python -m benchmarks.gate [--rounds N] (root; starts a sandbox).

Eight true hosts on one machine share its processors, so their gates take longer there than eight machines would need.
That part is measured beside it: as many gates of one node each, at once, do the same local work and no network. The
ratio is (eight nodes / eight single ones) / (two nodes / two single ones), all four in turns in one run; every time is
from the first attempt's begin to the last one's end, without the queue. All rails are held to one rate, so that the
wire and not a processor is what a rail's test takes.

Target: at most 1.5.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.startup import about
from janus_cluster.run.paths import RunDir
from janus_cluster.run.records.attempt import AttemptRecord
from janus_cluster.run.records.gate import AllReduceRecord
from janus_cluster.run.records.verdict import Verdict
from janus_cluster.sandbox import down, fault, load_info, up

NUMBERS = (2, 8)
RATE = "400mbit"
LIMIT_S = 900.0
TARGET = 1.5
# Held, so that all gates of one measurement begin at once, however long their submission took.
SETS = (
    "kind=preflight",
    "slurm.hold=true",
    "slurm.mem=1G",
    "preflight.min_free_gb=0.05",
    "preflight.use_node_memory=false",
)


def submit(home: Path, *, nodes: int) -> tuple[RunDir, str]:
    """A gate on so many nodes is in the queue and held. Returns: its run, and its job id."""
    sets = [word for text in SETS for word in ("--set", text)]
    command = [sys.executable, "-m", "janus_cluster.cli", "submit", "demo", "--cluster", "sandbox", "--json"]
    environ = os.environ | {"JANUS_HOME": str(home), "DEMO_DATA": str(home / "demo_data")}
    done = subprocess.run(
        [*command, "--nodes", str(nodes), *sets], env=environ, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    sent = json.loads(done.stdout)
    return RunDir(Path(sent["run_dir"])), str(sent["job_id"])


def release(home: Path, job_ids: list[str]) -> None:
    """The held jobs may begin."""
    info = load_info(home / "sandbox")
    environ = os.environ | (info.env() if info else {})
    subprocess.run(["scontrol", "release", ",".join(job_ids)], env=environ, check=True, capture_output=True)


def wait_for_end(run: RunDir) -> AttemptRecord:
    """The attempt has ended. Ends the benchmark where it did not pass."""
    deadline = time.monotonic() + LIMIT_S
    while True:
        record = AttemptRecord.load(run.attempt_json(1))
        if record is not None and record.ended_at is not None:
            break
        if time.monotonic() > deadline:
            raise SystemExit(f"no end after {LIMIT_S:g} s: {run.batch_log}")
        time.sleep(0.2)
    if record.state != "COMPLETED":
        raise SystemExit(Verdict.require(run.verdict_json(1)).summary())
    return record


def measure(home: Path, *, nodes: int, jobs: int) -> tuple[float, float]:
    """(wall seconds of `jobs` gates of `nodes` nodes each, at once; the longest probe among them)."""
    sent = [submit(home, nodes=nodes) for _ in range(jobs)]
    release(home, [job_id for _, job_id in sent])
    runs = [run for run, _ in sent]
    ended = [wait_for_end(run) for run in runs]
    probes = [
        float(AllReduceRecord.require(run.all_reduce_json(1, node)).values["duration_s"])
        for run, record in zip(runs, ended, strict=True)
        for node in record.nodes
    ]
    return max(float(r.ended_at or 0) for r in ended) - min(r.started_at for r in ended), max(probes)


def main() -> None:
    """Prints each time and the ratio; ends with 1 where the target is missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gate", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory(prefix="jg") as name:
        home = Path(name)
        make = [sys.executable, "-m", "janus_cluster.janusvln.world.demo", str(home / "demo_data"), "--episodes", "4"]
        subprocess.run(make, check=True, capture_output=True)
        try:
            info = up(home / "sandbox", nodes=max(NUMBERS), mode="namespaces")
            for node in info.node_names:
                fault(home / "sandbox", "slow-link", node, rate=RATE)
            report(home, rounds)
        finally:
            down(home / "sandbox")


def report(home: Path, rounds: int) -> None:
    """All sizes in turns, then the table."""
    print(about("gate"))
    together: dict[int, list[float]] = {n: [] for n in NUMBERS}
    single: dict[int, list[float]] = {n: [] for n in NUMBERS}
    probe: dict[int, list[float]] = {n: [] for n in NUMBERS}
    for _ in range(rounds):
        for number in NUMBERS:
            single[number].append(measure(home, nodes=1, jobs=number)[0])
            wall_s, probe_s = measure(home, nodes=number, jobs=1)
            together[number].append(wall_s)
            probe[number].append(probe_s)
    print(f"{'nodes':>5} {'gate s':>8} {'single gates at once s':>23} {'ratio':>6} {'probe s':>8}   median of {rounds}")
    for number in NUMBERS:
        row = (statistics.median(values[number]) for values in (together, single))
        gate_s, single_s = row
        ratio, probe_s = gate_s / single_s, statistics.median(probe[number])
        print(f"{number:>5} {gate_s:8.1f} {single_s:23.1f} {ratio:6.2f} {probe_s:8.1f}")
    few, many = NUMBERS
    ratios = [(together[many][k] / single[many][k]) / (together[few][k] / single[few][k]) for k in range(rounds)]
    ratio = statistics.median(ratios)
    spread = f"{min(ratios):.2f}–{max(ratios):.2f}"
    print(
        f"{many} nodes against {few}, beside what the machine itself costs: {ratio:.2f} ({spread}; target {TARGET:g})"
    )
    if ratio > TARGET:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
