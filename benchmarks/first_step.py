"""From the start of a job to its first optimizer step: python -m benchmarks.first_step [--runs 5] [--json F]

Runs the demo job (two simulated nodes, one rank each, gloo, tiny network, ZeRO-3) from `submit` on, each time in a new
place, but with the first run's index of the data. The gate ends where the ranks' own account begins: the record of kind
`start` that rank 0 writes into metrics.jsonl (janus_cluster/training/start.py). What Python imports is timed apart, in
the order in which training asks for it, in new processes. Bytecode is there, files are in the page cache.
Units: seconds of wall time, median (least to most).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from janus_cluster.rundir import RunDir, read_json

SETS = ("training.max_steps=2", "checkpoint.export=false", "data.num_workers=0")
# Each group, imported after those before it.
IMPORTS = {
    "torch": "import torch",
    "transformers, its table of models": "import transformers",
    "transformers' models (DTensor, sympy, dynamo)": "from transformers import PreTrainedModel",
    "transformers' Trainer, accelerate, peft": "from transformers import Trainer; import accelerate, peft",
    "DeepSpeed": "import deepspeed, deepspeed.ops",
    "Qwen2.5-VL, DINOv2": "from transformers import Dinov2WithRegistersModel, Qwen2_5_VLForConditionalGeneration",
    "janus_cluster": "import janus_cluster.training.entry",
}
NOT_NEEDED = ("pandas", "sklearn", "matplotlib", "tensorboard", "tensorflow", "torchvision", "scipy", "triton")
_TIMED = """
import json, sys, time
seconds, since = {}, time.perf_counter()
for name, code in json.loads(sys.argv[1]).items():
    exec(code)
    now = time.perf_counter()
    seconds[name], since = now - since, now
print(json.dumps([seconds, len(sys.modules), [name for name in sys.argv[2].split() if name in sys.modules]]))
"""
_OPENED = """
import collections, sys
seen = collections.Counter()
sys.addaudithook(lambda event, _: seen.update([event]) if event in ("open", "os.listdir", "os.scandir") else None)
import janus_cluster.training.entry
print(seen["open"], seen["os.listdir"] + seen["os.scandir"])
"""


def main() -> None:
    """Two tables: the parts of a start, and the imports."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.first_step", description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    # As on a node, where nothing forbids Python to keep its bytecode.
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    runs = time_starts(args.runs, environ)
    print_table(f"from submit to the first step, {args.runs} runs", runs)
    imports, note = time_imports(args.runs, environ)
    print_table("imports of one rank, alone", imports)
    print(note)
    if args.json:
        args.json.write_text(json.dumps({**about(), "starts": runs, "imports": imports, "seen": note}, indent=1))


def time_starts(count: int, environ: dict[str, str]) -> list[dict[str, float]]:
    """The parts of `count` runs; one more before them makes the index and whatever else is kept between runs."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make = [sys.executable, "-m", "janus_cluster.training.data.demo", str(folder / "data"), "--episodes", "16"]
        subprocess.run([*make, "--seed", "0"], check=True, capture_output=True, env=environ)
        environ = environ | {"DEMO_DATA": str(folder / "data"), "JANUS_HOME": str(folder / "home")}
        return [time_start(folder / "runs", environ) for _ in range(count + 1)][1:]


def time_start(runs: Path, environ: dict[str, str]) -> dict[str, float]:
    """The parts of one run, in their order."""
    janus = str(Path(sys.executable).with_name("janus-cluster"))
    before = set(runs.glob("demo-*"))
    sets = [word for value in (*SETS, f"runs_dir={runs}") for word in ("--set", value)]
    begun = time.time()
    command = [janus, "submit", "demo", "--nodes", "2", "--cluster", "local", "--follow", *sets]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    (folder,) = set(runs.glob("demo-*")) - before
    run = RunDir(folder)
    attempt = read_json(run.attempt_json(1))
    start: dict[str, Any] = next(m for m in run.read_metrics() if m["kind"] == "start")
    trained_s = start["time"] - start["total_s"]
    parts = {"submit": attempt["started_at"] - begun, "gate": trained_s - attempt["started_at"]}
    return {**parts, **start["seconds"], "whole": start["time"] - begun}


def time_imports(count: int, environ: dict[str, str]) -> tuple[list[dict[str, float]], str]:
    """Seconds of each group in `count` processes, and a line on what else was seen."""
    found = []
    words = ""
    for _ in range(count):
        argv = [sys.executable, "-c", _TIMED, json.dumps(IMPORTS), " ".join(NOT_NEEDED)]
        done = subprocess.run(argv, env=environ, capture_output=True, text=True, check=True)
        seconds, modules, needless = json.loads(done.stdout.splitlines()[-1])
        found.append({**seconds, "whole": sum(seconds.values())})
        words = f"{modules} modules; of {', '.join(NOT_NEEDED)}: {', '.join(needless) or 'none'}"
    done = subprocess.run([sys.executable, "-c", _OPENED], env=environ, capture_output=True, text=True, check=True)
    opened, listed = done.stdout.split()[-2:]
    return found, f"{words}; {opened} files opened, {listed} folders listed"


def print_table(title: str, rows: list[dict[str, float]]) -> None:
    print(title)
    for part in rows[0]:
        values = [row[part] for row in rows]
        print(f"  {part:<46} {statistics.median(values):6.2f} ({min(values):.2f} to {max(values):.2f})")


def about() -> dict[str, Any]:
    """Where it was measured."""
    import deepspeed
    import torch
    import transformers

    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    versions |= {"deepspeed": deepspeed.__version__, "python": platform.python_version()}
    command = f"python -m benchmarks.first_step {' '.join(sys.argv[1:])}"
    where = {"cores": os.cpu_count(), "machine": platform.machine(), "load_average": os.getloadavg()[0]}
    return {"command": command, "date": time.strftime("%Y-%m-%d"), **where, **versions}


if __name__ == "__main__":
    main()
