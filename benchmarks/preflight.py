"""What the gate costs: python -m benchmarks.preflight [--sandbox]

Prints the wall time of the static phase of one node (a process of its own, as the job starts it) and of a whole gate on
two nodes: simulated ones on this host, or with --sandbox those of a running sandbox Slurm (janus-cluster sandbox up).
Budget: 5 s and 60 s.
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
from typing import Any

RUNS = 5
STATIC_BUDGET_S, WHOLE_BUDGET_S = 5, 60


def write_run(folder: Path, profile: str) -> Path:
    """A run folder of the shipped preflight job, judged as `profile`."""
    janus = str(Path(sys.executable).with_name("janus-cluster"))
    sets = ["--set", f"preflight.profile={profile}", "--set", f"runs_dir={folder}"]
    if profile == "cpu":
        sets += ["--set", "hardware.device=cpu", "--set", "environment.profile=cpu"]
    command = [janus, "submit", "preflight", "--nodes", "1", "--dry-run", "--json", *sets]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return Path(json.loads(done.stdout)["run_dir"])


def time_static(run: Path) -> tuple[float, float]:
    """(wall seconds of the facts process, seconds of reading within it)."""
    identity = {"JANUS_NODE": "n1", "JANUS_NODE_RANK": "0", "JANUS_NUM_NODES": "1"}
    facts = run / "preflight" / "attempt_1" / "facts.n1.json"
    facts.parent.mkdir(parents=True, exist_ok=True)
    begun = time.perf_counter()
    argv = [sys.executable, "-m", "janus_cluster.node.task", str(run), "--attempt", "1", "--phase", "facts"]
    subprocess.run(argv, env=os.environ | identity, check=True, capture_output=True)
    return time.perf_counter() - begun, float(json.loads(facts.read_text())["duration_s"])


def time_whole(folder: Path, cluster: str) -> tuple[float, dict[str, Any]]:
    """(wall seconds from typing to verdict, the report) of the demo job's gate on two nodes."""
    janus = str(Path(sys.executable).with_name("janus-cluster"))
    (folder / "demo_data" / "episode").mkdir(parents=True, exist_ok=True)
    (folder / "demo_data" / "episode" / "step_0_STOP.json").write_text("{}")
    begun = time.perf_counter()
    command = [janus, "preflight", "demo", "--nodes", "2", "--cluster", cluster, "--json"]
    sets = ["--set", f"runs_dir={folder / 'runs'}"]
    done = subprocess.run([*command, *sets], cwd=folder, capture_output=True, text=True, check=False)
    took_s = time.perf_counter() - begun
    if not done.stdout:
        sys.exit(done.stderr)
    return took_s, json.loads(done.stdout)


def main() -> None:
    """Prints one line a measurement, and against which budget."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.preflight", description=__doc__)
    parser.add_argument("--sandbox", action="store_true", help="the whole gate on the nodes of a running sandbox Slurm")
    cluster = "sandbox" if parser.parse_args().sandbox else "local"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for profile in ("cpu", "h800-ib"):
            times = [time_static(write_run(folder, profile)) for _ in range(RUNS)]
            process, reading = (statistics.median(column) for column in zip(*times, strict=True))
            print(
                f"static phase, one node, {profile:<8} {process:6.2f} s the process, {reading:.2f} s reading "
                f"(median of {RUNS}; budget {STATIC_BUDGET_S} s)"
            )
        took_s, report = time_whole(folder, cluster)
        nodes = ", ".join(report["nodes"])
        print(f"whole gate, {nodes} ({cluster}) {took_s:6.1f} s, {report['verdict']} (budget {WHOLE_BUDGET_S} s)")


if __name__ == "__main__":
    main()
