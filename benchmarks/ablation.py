"""What history and spatial memory are worth to the tiny network: python -m benchmarks.ablation

Trains it on generated walks (janus-cluster demo-data) with everything, without the VGGT branch (model.lam 0) and
without history (data.history 0), each with several seeds, and prints held-out action accuracy. A seed decides the
split into training and held-out episodes, the initial weights and the order of samples; the three variants of one seed
share all of that. Each run is the real training entry under torchrun, one process, on the CPU.
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
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from janus_cluster.config.load import LoadedJob
from janus_cluster.config.resolve import resolve_job
from janus_cluster.config.schema import JobConfig
from janus_cluster.rundir import RunDir
from janus_cluster.training.data.demo import write_demo
from janus_cluster.training.data.world.layout import LEVELS

HISTORY = 2
# variant → what is changed in the job
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "everything": {},
    "without VGGT": {"model": {"lam": 0.0}},
    "without history": {"data": {"history": 0}},
}
NODE = "ablation"


@dataclass(frozen=True, slots=True)
class Result:
    """One run's last evaluation."""

    variant: str
    seed: int
    accuracy: float
    majority: float
    num_samples: int
    wall_s: float


def build_job(variant: str, *, seed: int, data: Path, options: argparse.Namespace) -> JobConfig:
    """The job of one run; only seed and variant differ between runs."""
    job: dict[str, dict[str, Any]] = {
        "hardware": {"gpus_per_node": 0, "device": "cpu", "processes_per_node": 1},
        "environment": {"profile": "cpu"},
        "model": {"preset": "tiny"},
        "data": {
            "roots": [str(data)],
            "history": HISTORY,
            "image_width": options.image_width,
            "min_pixels": 784,
            "num_workers": 0,
            "validation_fraction": options.validation_fraction,
        },
        "training": {
            "per_device_batch_size": 8,
            "gradient_accumulation_steps": 1,
            "max_steps": options.steps,
            "learning_rate": options.learning_rate,
            "projector_learning_rate": options.learning_rate,
            "vision_learning_rate": options.learning_rate,
            "warmup_ratio": 0.05,
            "action_loss_weight": options.action_loss_weight,
            "precision": "fp32",
            "gradient_checkpointing": False,
            "tune": {"vision": True},
            "logging_steps": 50,
            "seed": seed,
        },
        "deepspeed": {"profile": "zero0"},
        "checkpoint": {"every_steps": 1_000_000, "export": False},
    }
    for section, values in VARIANTS[variant].items():
        job[section] |= values
    return JobConfig.model_validate({"name": "ablation", "nodes": 1} | job)


def write_run_folder(path: Path, job: JobConfig) -> RunDir:
    """`path` holds what the training entry reads, and attempt 1 has begun."""
    path.mkdir(parents=True)
    loaded = LoadedJob(config=job, origins={}, source="benchmarks/ablation.py", path=path / "job.yaml")
    resolved = resolve_job(loaded, run_dir=path, cluster="local", environ={}, cwd=path.parent, python=sys.executable)
    run = RunDir(path)
    run.resolved_json.write_text(resolved.model_dump_json(), encoding="utf-8")
    run.ds_config_json.write_text(json.dumps(resolved.ds_config), encoding="utf-8")
    run.begin_attempt()
    return run


def measure(variant: str, seed: int, *, data: Path, folder: Path, options: argparse.Namespace) -> Result:
    """The run has ended. Raises: RuntimeError with the end of its log if it failed."""
    run = write_run_folder(
        folder / f"{variant.replace(' ', '-')}-{seed}", build_job(variant, seed=seed, data=data, options=options)
    )
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1",
        "-m", "--", "janus_cluster.training.entry", str(run.path), "--attempt", "1", "--node", NODE,
    ]  # fmt: skip
    begun = time.perf_counter()
    environ = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        log = run.rank_log(1, NODE, 0)
        said = log.read_text(encoding="utf-8") if log.exists() else ""
        raise RuntimeError(f"{variant}, seed {seed}: exit {done.returncode}\n{said[-2000:]}{done.stderr[-2000:]}")
    last = [event for event in run.read_metrics() if event["kind"] == "eval"][-1]
    return Result(
        variant,
        seed,
        last["action_accuracy"],
        last["majority_accuracy"],
        last["num_samples"],
        time.perf_counter() - begun,
    )


def render_table(results: Sequence[Result]) -> str:
    """Markdown: a row a variant, a column a seed, mean ± standard deviation, and the difference to everything."""
    seeds = sorted({result.seed for result in results})
    rows = {name: [r for r in sorted(results, key=lambda r: r.seed) if r.variant == name] for name in VARIANTS}
    whole = [r.accuracy for r in rows["everything"]]
    head = ["variant", *(f"seed {seed}" for seed in seeds), "mean ± sd", "paired difference to everything"]
    lines = [_row(head), _row(["---"] * len(head))]
    for name, row in rows.items():
        values = [r.accuracy for r in row]
        paired = [a - b for a, b in zip(values, whole, strict=True)]
        difference = "" if name == "everything" else _spread(paired, signed=True)
        lines.append(_row([name, *(f"{v:.3f}" for v in values), _spread(values), difference]))
    majority = [r.majority for r in rows["everything"]]
    lines.append(_row(["majority class", *(f"{m:.3f}" for m in majority), _spread(majority), ""]))
    return "\n".join(lines)


def _spread(values: Sequence[float], *, signed: bool = False) -> str:
    sd = statistics.stdev(values) if len(values) > 1 else float("nan")
    return f"{statistics.mean(values):{'+' if signed else ''}.3f} ± {sd:.3f}"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ablation", description=__doc__)
    parser.add_argument("--level", choices=list(LEVELS), default="memory")
    parser.add_argument("--episodes", type=int, default=200)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--image-width", type=int, default=112)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--action-loss-weight", type=float, default=4.0)
    parser.add_argument("--validation-fraction", type=float, default=0.25)
    parser.add_argument("--at-once", type=int, default=1, help="runs side by side, one core each")
    parser.add_argument("--json", type=Path, help="write the single results there too")
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    with tempfile.TemporaryDirectory(prefix="janus-ablation-") as name:
        folder = Path(name)
        written = write_demo(folder / "data", num_episodes=options.episodes, seed=0, level=options.level)
        print(f"level {options.level}: {options.episodes} episodes, {written}", flush=True)

        def run(task: tuple[int, str]) -> Result:
            result = measure(task[1], task[0], data=folder / "data", folder=folder, options=options)
            print(f"{result.variant}, seed {result.seed}: {result.accuracy:.3f} ({result.wall_s:.0f} s)", flush=True)
            return result

        with ThreadPoolExecutor(options.at_once) as pool:
            results = list(pool.map(run, [(seed, variant) for seed in options.seeds for variant in VARIANTS]))
    held_out = ", ".join(str(r.num_samples) for r in results if r.variant == "everything")
    print(f"\nheld-out samples by seed: {held_out}\n\n{render_table(results)}")
    if options.json:
        settings = {key: value for key, value in vars(options).items() if key != "json"}
        record = {"settings": settings, "results": [asdict(result) for result in results]}
        options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
