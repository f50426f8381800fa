"""What a micro-step costs, ours against the predecessor's, lever by lever: python -m benchmarks.training_step

Every way of computing it (data to gradients, and the optimizer's share) is built in one process under a real DeepSpeed
engine, and all take turns: a ratio is taken within one round, so that a machine that others use too cancels out. The
same samples, initial weights and random state everywhere: what claims to be exact must give the same loss.

  --size tiny    the networks of the tiny preset
  --size small   the depths of the 7B network and of VGGT-1B with tiny widths: all their module calls, few of their FLOP

Times on a CPU tell of calls, hooks and copies; a GPU spends its time otherwise: python -m benchmarks.gpu.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import deepspeed.ops
import numpy as np
import torch
import torch.distributed as dist
import transformers
from PIL import Image

from benchmarks.counting import Counts, count_step
from benchmarks.data_pipeline import write_episode
from benchmarks.predecessor import FloatDataset, SwitchableModel, collate_floats, old_zero3_config
from janus_cluster.config.networks import PRESETS
from janus_cluster.config.schema import Data, JobConfig, Model, SegmentWeights, Training
from janus_cluster.render.deepspeed import resolve_ds_config
from janus_cluster.resources import templates_dir
from janus_cluster.training.data.dataset import NavigationDataset, collate
from janus_cluster.training.data.index import load_samples
from janus_cluster.training.data.prompt import sample_texts
from janus_cluster.training.data.tokenizer import build_tiny_tokenizer
from janus_cluster.training.entry import quiet_libraries, tokenizer_ids
from janus_cluster.training.held_out import move_to
from janus_cluster.training.loss import action_count, text_weight_sum
from janus_cluster.training.model.build import mark_trainable, parameter_groups, set_recompute
from janus_cluster.training.model.compile import compile_blocks
from janus_cluster.training.model.presets import build_config
from janus_cluster.training.model.vggt import Aggregator

SEED = 0
HISTORY = 8
BUCKETS = ("reduce_bucket_size", "allgather_bucket_size", "stage3_prefetch_bucket_size")


@dataclass(frozen=True, kw_only=True)
class Way:
    """One way of computing a micro-step."""

    vggt: str = "outside, one pass"  # "inside, frame by frame" | "inside, one pass"
    zero: str = "2"  # "1" | "3" | "3, old JSON"
    image_mode: str = "crop"  # "pad"
    recompute_every: int = 0  # n: every n-th language layer; 0: none
    recompute_vision: bool = False
    head: str = "label positions"  # "all positions"
    vision: str = "grouped"  # "one window at a time"
    pixels: str = "uint8"  # "floats"
    compile_vggt: bool = False


OURS = Way()
PREDECESSOR = Way(
    vggt="inside, frame by frame",
    zero="3, old JSON",
    image_mode="pad",
    recompute_every=1,
    recompute_vision=True,
    head="all positions",
    vision="one window at a time",
    pixels="floats",
)
NO_RECOMPUTE: dict[str, Any] = {"recompute_every": 0, "recompute_vision": False}
# (lever, off → on, from which way, what is changed, whether this is the lever's "on" side)
LEVERS: tuple[tuple[str, str, dict[str, Any], dict[str, Any]], ...] = (
    (
        "VGGT outside the engine, one pass",
        "inside, frame by frame → outside, one pass",
        {"vggt": PREDECESSOR.vggt},
        {"vggt": OURS.vggt},
    ),
    ("ZeRO-3, old JSON → ZeRO-2", "3 → 2", {"zero": "3, old JSON"}, {"zero": "2"}),
    ("crop", "pad → crop", {"image_mode": "pad"}, {"image_mode": "crop"}),
    ("no recompute", "every layer → none", {"recompute_every": 1, "recompute_vision": True}, NO_RECOMPUTE),
    ("head on label positions", "all → labels", {"head": "all positions"}, {"head": "label positions"}),
    (
        "grouped windows, layout read once",
        "a call a window → a call a length",
        {"vision": "one window at a time"},
        {"vision": "grouped"},
    ),
    ("uint8 pixels", "floats → uint8", {"pixels": "floats"}, {"pixels": "uint8"}),
)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """`off` and `on` are names of ways; `exact` says whether both must give the same loss."""

    lever: str
    what: str
    off: str
    on: str
    exact: bool = True


def plan(*, with_compile: bool, few: bool) -> tuple[dict[str, Way], list[Comparison]]:
    """Every way by name, and what is compared with what. `few`: only the whole, and each lever taken out of ours."""
    ways = {"predecessor": PREDECESSOR, "ours": OURS}
    same_pixels = "predecessor, crop"
    ways[same_pixels] = replace(PREDECESSOR, image_mode="crop")
    compared = [
        Comparison(lever="everything", what="predecessor → ours", off="predecessor", on="ours", exact=False),
        Comparison(lever="everything but crop", what="predecessor, crop → ours", off=same_pixels, on="ours"),
    ]
    for lever, what, off, on in LEVERS:
        without = f"ours without {lever}"
        ways[without] = replace(OURS, **off)
        exact = lever != "crop"
        compared.append(Comparison(lever=lever, what=f"{what}, last", off=without, on="ours", exact=exact))
        if few:
            continue
        alone = f"predecessor with {lever}"
        ways[alone] = replace(PREDECESSOR, **on)
        compared.append(Comparison(lever=lever, what=f"{what}, first", off="predecessor", on=alone, exact=exact))
    if not few:
        ways |= {
            "ours, ZeRO-3": replace(OURS, zero="3"),
            "ours, ZeRO-1": replace(OURS, zero="1"),
            "ours, every 2nd recomputed": replace(OURS, recompute_every=2),
            "predecessor, VGGT in one pass inside": replace(PREDECESSOR, vggt="inside, one pass"),
        }
        compared += [
            Comparison(lever="ZeRO-3 → ZeRO-2", what="our JSONs, last", off="ours, ZeRO-3", on="ours"),
            Comparison(lever="ZeRO-2 → ZeRO-1", what="our JSONs, last", off="ours", on="ours, ZeRO-1"),
            Comparison(
                lever="recompute every 2nd layer → none", what="last", off="ours, every 2nd recomputed", on="ours"
            ),
            Comparison(
                lever="VGGT in one pass, still inside",
                what="first",
                off="predecessor",
                on="predecessor, VGGT in one pass inside",
            ),
        ]
    if with_compile:
        ways["ours, VGGT compiled"] = replace(OURS, compile_vggt=True)
        compared.append(
            Comparison(lever="torch.compile of VGGT's blocks", what="last", off="ours", on="ours, VGGT compiled")
        )
    return ways, compared


@dataclass(frozen=True, kw_only=True)
class Size:
    """Widths are the tiny preset's; depths as given."""

    text_layers: int
    vision_blocks: int
    vggt_depth: int
    dino_depth: int
    image_width: int

    def configure(self, config: Any) -> Any:
        """`config` of the tiny preset with these depths."""
        config.text_config.num_hidden_layers = self.text_layers
        config.text_config.layer_types = ["full_attention"] * self.text_layers
        config.vision_config.depth = self.vision_blocks
        config.vision_config.fullatt_block_indexes = list(range(7, self.vision_blocks, 8)) or [1]
        config.vggt_config |= {"depth": self.vggt_depth, "dino_depth": self.dino_depth}
        return config


SIZES = {
    "tiny": Size(text_layers=2, vision_blocks=2, vggt_depth=3, dino_depth=2, image_width=84),
    "small": Size(text_layers=28, vision_blocks=32, vggt_depth=24, dino_depth=24, image_width=168),
}


class Bench:
    """Samples, tokenizer and sizes that all ways share."""

    def __init__(self, folder: Path, *, size: Size, device: str, accumulation: int) -> None:
        self.size, self.device, self.accumulation = size, torch.device(device), accumulation
        write_walk(folder / "walk", steps=HISTORY + 2 * accumulation)
        self.data = {
            mode: Data(
                roots=[str(folder)],
                history=HISTORY,
                image_mode=mode,
                image_width=size.image_width,
                min_pixels=784,
                validation_fraction=0,
            )
            for mode in ("crop", "pad")
        }
        self.samples = load_samples(self.data["crop"], seed=SEED).train[HISTORY:]
        self.tokenizer = build_tiny_tokenizer(sample_texts(self.samples))
        self.ids = tokenizer_ids(self.tokenizer)

    def training(self, way: Way) -> Training:
        return Training(
            gradient_accumulation_steps=self.accumulation,
            gradient_checkpointing=way.recompute_every > 0,
            gradient_checkpointing_every=max(1, way.recompute_every),
            precision="fp32",
            learning_rate=1e-4,
            seed=SEED,
        )

    def ds_config(self, way: Way, hidden_size: int, world_size: int) -> dict[str, Any]:
        stage = way.zero[0]
        profile = json.loads((templates_dir() / "deepspeed" / f"zero{stage}.json").read_text(encoding="utf-8"))
        if way.zero == "3, old JSON":
            profile["zero_optimization"] = old_zero3_config(hidden_size)
        elif self.device.type == "cpu":
            # Buckets are allocated whole: the shipped ones are a hundred times these networks.
            profile["zero_optimization"] |= {k: 100_000 for k in BUCKETS if k in profile["zero_optimization"]}
        device = self.device.type
        job = JobConfig.model_validate(
            {
                "name": "benchmark",
                "nodes": 1,
                "hardware": {"device": device, "gpus_per_node": int(device == "cuda"), "processes_per_node": 1},
                "training": self.training(way).model_dump(),
            }
        )
        config = resolve_ds_config(profile, job, world_size=world_size)
        return config | {"zero_allow_untested_optimizer": True, "steps_per_print": 1_000_000}

    def build_model(self, way: Way) -> SwitchableModel:
        """The same weights for every way."""
        torch.manual_seed(SEED)
        config = self.size.configure(build_config(Model(preset="tiny"), self.ids))
        model = SwitchableModel._from_config(config, dtype=torch.float32)
        model.attach_vggt(Aggregator(config.vggt).to(self.device))
        training = self.training(way)
        mark_trainable(model, training)
        if way.vggt != OURS.vggt:
            model.put_vggt_inside(frame_by_frame=way.vggt == "inside, frame by frame")
        model.head_on_all_positions = way.head == "all positions"
        if way.vision == "one window at a time":
            model.use_plain_vision()
        set_recompute(model, training)
        if way.recompute_vision:
            model.model.visual.activation_checkpointing_enable()
        if way.compile_vggt:
            compile_blocks(model.vggt)
        return model.to(self.device).train()


def write_walk(folder: Path, *, steps: int) -> None:
    """One episode of 160×120 frames of noise."""
    write_episode(folder, steps=steps, number=SEED)
    chance = np.random.default_rng(SEED)
    for path in sorted(folder.glob("*.png")):
        Image.fromarray(chance.integers(0, 255, (120, 160, 3), dtype=np.uint8)).save(path)


@dataclass
class Times:
    """Seconds of one optimizer step, divided by its micro-steps: CPU time on a CPU, wall time on a GPU."""

    data_s: float
    compute_s: float
    wall_s: float

    @property
    def whole_s(self) -> float:
        return self.data_s + self.compute_s


class Rig:
    """One way, built, under its own engine."""

    def __init__(self, bench: Bench, way: Way) -> None:
        self.bench, self.way = bench, way
        data = bench.data[way.image_mode]
        ours = NavigationDataset(
            bench.samples, tokenizer=bench.tokenizer, data=data, segment_weights=SegmentWeights()
        )
        self.dataset: Any = ours
        if way.pixels == "floats":
            self.dataset = FloatDataset(ours, tokenizer=bench.tokenizer, data=data)
        model = bench.build_model(way)
        training = bench.training(way)
        groups = parameter_groups(model, training)
        config = bench.ds_config(way, model.config.text_config.hidden_size, dist.get_world_size())
        self.engine, *_ = deepspeed.initialize(
            model=model,
            config=copy.deepcopy(config),
            optimizer=torch.optim.AdamW(groups, fused=bench.device.type == "cuda"),
        )
        self.number = 0
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.times: list[Times] = []

    def load(self) -> list[dict[str, Any]]:
        """The micro-batches of the next optimizer step."""
        per_step = self.bench.accumulation
        batches = []
        for micro in range(per_step):
            index = (self.number * per_step + micro) % len(self.bench.samples)
            items = [self.dataset[index]]
            batch = collate(items, pad_token_id=self.bench.tokenizer.pad_token_id)
            batches.append(collate_floats(items, batch) if self.way.pixels == "floats" else batch)
        self.number += 1
        return batches

    def compute(self, batches: Sequence[dict[str, Any]]) -> torch.Tensor:
        """The optimizer step is done. Returns: its loss, on the device."""
        moved = [move_to(batch, self.bench.device) for batch in batches]
        text = torch.stack([text_weight_sum(b["labels"], b["loss_weights"]) for b in moved]).sum()
        actions = torch.stack([action_count(b["actions"]) for b in moved]).sum()
        denominator = torch.stack((text, actions)).clamp(min=1.0) / len(moved)
        total = torch.zeros((), device=self.bench.device)
        for batch in moved:
            loss = self.engine(**batch, loss_denominator=denominator).loss
            self.engine.backward(loss)
            total += loss.detach() / len(moved)
            self.engine.step()
        return total

    def step(self, *, timed: bool = False) -> None:
        # On a CPU that others use too, the time that this process worked is steadier than the clock.
        clock = time.process_time if self.bench.device.type == "cpu" else time.perf_counter
        began, begun = time.perf_counter(), clock()
        batches = self.load()
        loaded = clock()
        loss = float(self.compute(batches))
        done, wall_s = clock(), time.perf_counter() - began
        self.losses.append(loss)
        self.norms.append(float(self.engine.get_global_grad_norm()))
        if timed:
            per_step = self.bench.accumulation
            self.times.append(Times((loaded - begun) / per_step, (done - loaded) / per_step, wall_s / per_step))

    def count(self) -> Counts:
        """Counts of one optimizer step."""
        batches = self.load()
        return count_step(lambda: self.compute(batches))


@dataclass
class Row:
    """One comparison, measured. Ratios are off / on: above 1 the lever pays."""

    lever: str
    what: str
    off: str
    on: str
    ratio: float
    ratio_low: float
    ratio_high: float
    compute_ratio: float
    wall_ratio: float
    exact: bool
    loss_difference: float
    norm_difference: float
    later_loss_difference: float


def compare(rigs: dict[str, Rig], comparison: Comparison) -> Row:
    off, on = rigs[comparison.off], rigs[comparison.on]
    pairs = list(zip(off.times, on.times, strict=True))
    ratios = [a.whole_s / b.whole_s for a, b in pairs]
    return Row(
        lever=comparison.lever,
        what=comparison.what,
        off=comparison.off,
        on=comparison.on,
        ratio=statistics.median(ratios),
        ratio_low=min(ratios),
        ratio_high=max(ratios),
        compute_ratio=statistics.median(a.compute_s / b.compute_s for a, b in pairs),
        wall_ratio=statistics.median(a.wall_s / b.wall_s for a, b in pairs),
        exact=comparison.exact,
        loss_difference=abs(off.losses[0] - on.losses[0]),
        norm_difference=abs(off.norms[0] - on.norms[0]) / off.norms[0],
        later_loss_difference=abs(off.losses[-1] - on.losses[-1]),
    )


def measure(
    bench: Bench, ways: dict[str, Way], *, repeats: int, warm_up: int, counted: bool = True
) -> tuple[dict[str, Rig], dict[str, Counts]]:
    """Every way has run the same steps, in turns, and the counts of one step of each."""
    rigs: dict[str, Rig] = {}
    for name, way in ways.items():
        rigs[name] = Rig(bench, way)
        for _ in range(warm_up):
            rigs[name].step()
    names = list(rigs)
    gc.collect()
    gc.freeze()
    for number in range(repeats):
        # Each round begins with another one, so that no way always follows the same.
        for name in names[number % len(names) :] + names[: number % len(names)]:
            gc.collect()
            rigs[name].step(timed=True)
        print(f"round {number + 1} of {repeats}", file=sys.stderr, flush=True)
    return rigs, {name: rig.count() for name, rig in rigs.items()} if counted else {}


@contextmanager
def one_process() -> Iterator[None]:
    """A process group of this process alone; no port is taken."""
    # DeepSpeed would compile its shared-memory all-reduce, which only inference calls.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=0, world_size=1)
        try:
            yield
        finally:
            dist.destroy_process_group()


def describe() -> dict[str, Any]:
    """Hardware, versions, command."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "cpu": next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "?"),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "deepspeed": deepspeed.__version__,
        },
        "seed": SEED,
        "command": "python -m benchmarks.training_step " + " ".join(sys.argv[1:]),
    }


def render_rows(rows: Sequence[Row], counts: dict[str, Counts]) -> str:
    """Markdown, a row a comparison."""
    lines = [
        "| lever | off → on | ratio | min–max | by the clock | without data | loss differs by | gradient norm by "
        "| peak MB off → on |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        exact = f"{row.loss_difference:.1e}" if row.exact else "other pixels"
        norm = f"{row.norm_difference:.1e}" if row.exact else "–"
        memory = "–"
        if counts:
            memory = f"{counts[row.off].peak_bytes / 1e6:.1f} → {counts[row.on].peak_bytes / 1e6:.1f}"
        lines.append(
            f"| {row.lever} | {row.what} | {row.ratio:.2f} | {row.ratio_low:.2f}–{row.ratio_high:.2f} | "
            f"{row.wall_ratio:.2f} | {row.compute_ratio:.2f} | {exact} | {norm} | {memory} |"
        )
    return "\n".join(lines)


def render_counts(rigs: dict[str, Rig], counts: dict[str, Counts], accumulation: int) -> str:
    """Markdown, a row a way: times and counts of a micro-step."""
    lines = [
        "| way | micro-step CPU s | of it data | module calls | host waits | operators | collectives |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, rig in rigs.items():
        whole = statistics.median(t.whole_s for t in rig.times)
        data = statistics.median(t.data_s for t in rig.times)
        cells = ["–"] * 4
        if counts:
            found = counts[name]
            numbers = (found.module_calls, found.host_waits, found.operators, sum(found.collectives.values()))
            cells = [f"{n / accumulation:,.0f}" for n in numbers]
        lines.append(f"| {name} | {whole:.4f} | {data:.4f} | {' | '.join(cells)} |")
    return "\n".join(lines)


@dataclass
class Report:
    """Everything that was found, as the JSON file holds it."""

    about: dict[str, Any]
    settings: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    ways: dict[str, Any] = field(default_factory=dict)
    peak_rss_mb: float = 0.0


def run(*, size: str, device: str, repeats: int, accumulation: int, few: bool, with_compile: bool) -> tuple[Report, str]:
    """Measured, as a report and as Markdown."""
    begun = time.perf_counter()
    settings = {"size": size, "device": device, "repeats": repeats, "accumulation": accumulation} | asdict(SIZES[size])
    report = Report(describe(), settings)
    ways, comparisons = plan(with_compile=with_compile, few=few)
    with tempfile.TemporaryDirectory(prefix="training-step-") as folder, one_process():
        bench = Bench(Path(folder) / "demo", size=SIZES[size], device=device, accumulation=accumulation)
        rigs, counts = measure(bench, ways, repeats=repeats, warm_up=2)
        report.rows = [compare(rigs, comparison) for comparison in comparisons]
        report.ways = {
            name: {
                "way": asdict(rig.way),
                "times": [asdict(t) for t in rig.times],
                "losses": rig.losses,
                "counts_per_optimizer_step": asdict(counts[name]),
            }
            for name, rig in rigs.items()
        }
        report.peak_rss_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
        text = f"{render_rows(report.rows, counts)}\n\n{render_counts(rigs, counts, accumulation)}"
        for rig in rigs.values():
            rig.engine.destroy()
    report.settings["wall_s"] = round(time.perf_counter() - begun)
    return report, text


def count_collectives(stage: str, *, accumulation: int) -> list[dict[str, int]]:
    """Collectives of every micro-step of one optimizer step, on this rank of several; torchrun starts it."""
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    folder = Path(tempfile.mkdtemp(prefix=f"training-step-{dist.get_rank()}-"))
    bench = Bench(folder / "demo", size=SIZES["tiny"], device="cpu", accumulation=accumulation)
    rig = Rig(bench, replace(OURS, zero=stage))
    rig.step()
    found = []
    for batch in rig.load():
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiled:
            rig.engine.backward(rig.engine(**batch).loss)
            rig.engine.step()
        events = profiled.key_averages()
        found.append({e.key.removeprefix("c10d::"): e.count for e in events if e.key.startswith("c10d::")})
    dist.barrier()
    rig.engine.destroy()
    dist.destroy_process_group()
    return found


def ask_for_collectives(stage: str, *, accumulation: int) -> list[dict[str, int]]:
    """What `count_collectives` finds on rank 0 of two processes."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "collectives.json"
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
            "-m", "benchmarks.training_step", "--collectives-of", stage, "--json", str(out),
            "--accumulation", str(accumulation),
        ]  # fmt: skip
        environ = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "DS_ACCELERATOR": "cpu"}
        done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"ZeRO-{stage} on two processes: exit {done.returncode}\n{done.stderr[-2000:]}")
        found: list[dict[str, int]] = json.loads(out.read_text(encoding="utf-8"))
        return found


def render_collectives(found: dict[str, list[dict[str, int]]]) -> str:
    """Markdown, a row a stage: what each micro-step of an optimizer step sends."""
    width = max(len(steps) for steps in found.values())
    names = [f"micro-step {n + 1}" for n in range(width)]
    lines = [f"| two processes | {' | '.join(names)} (with the optimizer) |", f"| --- |{' --- |' * width}"]
    for stage, steps in found.items():
        cells = [", ".join(f"{n} {name}" for name, n in sorted(step.items())) or "none" for step in steps]
        lines.append(f"| ZeRO-{stage} | {' | '.join(cells)} |")
    return "\n".join(lines)


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training_step", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--size", choices=list(SIZES), default="tiny")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--accumulation", type=int, default=2, help="micro-steps of an optimizer step")
    parser.add_argument("--few", action="store_true", help="the whole, and each lever taken out of ours; nothing else")
    parser.add_argument("--compile", action="store_true", help="torch.compile too (needs g++ on a CPU)")
    parser.add_argument("--collectives", action="store_true", help="count them on two processes too")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--collectives-of", metavar="STAGE", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main() -> None:
    options = parse_arguments()
    warnings.filterwarnings("ignore", category=FutureWarning)
    quiet_libraries()
    deepspeed.utils.logger.setLevel("ERROR")
    if options.collectives_of:
        found = count_collectives(options.collectives_of, accumulation=options.accumulation)
        if os.environ["RANK"] == "0":
            options.json.write_text(json.dumps(found), encoding="utf-8")
        return
    report, text = run(
        size=options.size,
        device=options.device,
        repeats=options.repeats,
        accumulation=options.accumulation,
        few=options.few,
        with_compile=options.compile,
    )
    print(text)
    record = asdict(report)
    if options.collectives:
        collectives = {stage: ask_for_collectives(stage, accumulation=options.accumulation) for stage in ("1", "2", "3")}
        record["collectives_on_two_processes"] = collectives
        print(f"\n{render_collectives(collectives)}")
    if options.json:
        options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
