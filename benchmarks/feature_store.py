"""What a store of frozen features could save and would hold: python -m benchmarks.feature_store [--size tiny|small]

1. The frozen encoders' share of a step: in floating point operations at the real sizes (janus_cluster/plan/flops.py,
   every layer or none recomputed), and in CPU time of a micro-step, VGGT's pass against the whole, in pairs.
2. What two samples of one episode share. VGGT's tokens of a frame depend on the frames before it, so only equal
   beginnings can be shared; the histories are those of training/data/history.py over walks of demo-data (their number
   of steps), and over walks of 30 to 120 steps, as long as those of R2R and RxR.
3. Bytes, bandwidth, and the gain at best. Building a store costs one pass of VGGT over every context.
Units: GB are 1e9 bytes, seconds as `janus-cluster plan` predicts them.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from transformers import logging as transformers_logging

from benchmarks.ways import OURS, SEED, SIZES, Bench, Rig, one_process
from janus_cluster.config.schema import Data, Tune
from janus_cluster.plan.flops import Flops, Work, count_flops
from janus_cluster.plan.hardware import Assumptions
from janus_cluster.plan.sample import plan_sample
from janus_cluster.plan.sizes import preset_sizes
from janus_cluster.training.data.history import history_positions
from janus_cluster.training.data.world.tasks import plan_walk

SAMPLES = 600_000  # a data set of the size of R2R-CE and RxR-CE together, one sample a step
BF16 = 2
HISTORY = 8
PEAK_FLOP_PER_S = 989e12
GPUS = 8
WALKS = 200
LENGTHS = (30, 121)


def main() -> None:
    """The tables of docs/feature-store.md."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.feature_store", description=__doc__)
    parser.add_argument("--size", choices=list(SIZES), default="tiny")
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    transformers_logging.set_verbosity_error()
    show_shares()
    show_gains()
    show_bytes()
    show_sharing()
    print(f"a frame is in {uses_of_a_frame():.1f} samples")
    show_cpu_share(args.size, args.repeats)


def flops(preset: str, *, recompute_every: int = 0) -> Flops:
    return count_flops(preset_sizes(preset), plan_sample(Data()), Work(recompute_every=recompute_every))


def show_shares() -> None:
    """Operations of a sample of nine frames."""
    print("TFLOP a sample       total   VGGT   of it DINO   ViT (frozen)   VGGT's share   with ViT")
    for preset in ("qwen2.5-vl-7b", "qwen2.5-vl-3b"):
        for every in (0, 1):
            f = flops(preset, recompute_every=every)
            name = f"{preset[-2:]}, {'all' if every else 'none'} recomputed"
            print(
                f"{name:<20} {f.total / 1e12:5.1f} {f.vggt / 1e12:6.1f} {f.dino / 1e12:8.1f} {f.vision / 1e12:14.1f}"
                f" {f.vggt / f.total:14.1%} {(f.vggt + f.vision) / f.total:12.1%}"
            )
    learning = count_flops(
        preset_sizes("qwen2.5-vl-7b"), plan_sample(Data()), Work(tune=Tune(vision=True), recompute_every=0)
    )
    print(f"7b, the ViT learns: {learning.total / 1e12:.1f}, VGGT {learning.vggt / learning.total:.1%}")


@dataclass(frozen=True, kw_only=True)
class Kept:
    """One thing that could be stored. `parts` of Flops it saves, `entry_bytes` for each of its entries, `uses`: samples
    that read one entry, `reads` entries a sample."""

    name: str
    parts: tuple[str, ...]
    entry_bytes: int
    uses: float
    reads: int

    def saved(self, f: Flops) -> float:
        return float(sum(getattr(f, part) for part in self.parts))

    def built(self, f: Flops) -> float:
        """Operations a sample to make every entry once."""
        return self.saved(f) / self.uses


def kept_things() -> list[Kept]:
    """What could be kept; every sample has a frame of its own, and every frame is in the history of later samples."""
    sample, sizes = plan_sample(Data()), preset_sizes("qwen2.5-vl-7b")
    feature = sample.rows * sample.columns * sizes.vggt.feature_dim * BF16
    patches = sample.vggt_patches * sizes.vggt.embed_dim * BF16
    vision = sample.rows * sample.columns * sizes.vision.dim * BF16
    frames = HISTORY + 1
    each = uses_of_a_frame()
    return [
        Kept(name="VGGT's feature, by ordered frames", parts=("vggt",), entry_bytes=feature, uses=1, reads=1),
        Kept(name="DINO's patches, by image", parts=("dino",), entry_bytes=patches, uses=each, reads=frames),
        Kept(name="ViT's patches, by image", parts=("vision",), entry_bytes=vision, uses=each, reads=frames),
        Kept(
            name="ViT's and DINO's, by image",
            parts=("vision", "dino"),
            entry_bytes=vision + patches,
            uses=each,
            reads=frames,
        ),
    ]


def show_gains() -> None:
    """Seconds without a store over seconds with one, building it included; nothing lost by reading."""
    print(
        "\nspeed-up at best: epochs               1      2      3     10   stored before   1, three instructions a walk"
    )
    for preset in ("qwen2.5-vl-7b", "qwen2.5-vl-3b"):
        f = flops(preset)
        for kept in kept_things():
            found = [speed_up(f, saved=kept.saved(f), built=kept.built(f), epochs=n) for n in (1, 2, 3, 10)]
            found += [f.total / (f.total - kept.saved(f))]
            found += [speed_up(f, saved=kept.saved(f), built=kept.built(f) / 3, epochs=1)]
            print(f"{preset[-2:]}, {kept.name:<34}" + " ".join(f"{value:6.2f}" for value in found))


def speed_up(f: Flops, *, saved: float, built: float, epochs: int) -> float:
    """Of `epochs` passes; `built` operations a sample are spent on the store before them."""
    return epochs * f.total / (built + epochs * (f.total - saved))


def show_bytes() -> None:
    """Sizes of the things that could be kept, and what a node would read of them a second."""
    print(f"\n{'kept':<36} MB an entry   TB of {SAMPLES:,}   MB read a sample   GB/s of a node: 7b   3b")
    for kept in kept_things():
        rates = []
        for preset in ("qwen2.5-vl-7b", "qwen2.5-vl-3b"):
            f = flops(preset)
            samples_per_s = GPUS * PEAK_FLOP_PER_S * Assumptions().efficiency / (f.total - kept.saved(f))
            rates.append(samples_per_s * kept.reads * kept.entry_bytes / 1e9)
        print(
            f"{kept.name:<36} {kept.entry_bytes / 1e6:11.1f} {kept.entry_bytes * SAMPLES / 1e12:15.2f}"
            f" {kept.reads * kept.entry_bytes / 1e6:18.1f} {rates[0]:20.2f} {rates[1]:4.2f}"
        )
    vggt = preset_sizes("qwen2.5-vl-7b").vggt
    tokens = plan_sample(Data()).vggt_patches + vggt.num_special_tokens
    keys = (vggt.depth - 1) * 2 * tokens * vggt.embed_dim * BF16
    print(f"keys and values of VGGT's global blocks, to share beginnings: {keys / 1e6:.0f} MB a frame")


def uses_of_a_frame() -> float:
    """Samples that show a frame, in walks as long as those of R2R and RxR."""
    walks = [[history_positions(step, HISTORY) for step in range(length)] for length in long_walks()]
    return sum(len(context) for walk in walks for context in walk) / sum(len(walk) for walk in walks)


def long_walks() -> list[int]:
    """Steps of WALKS walks."""
    return [int(length) for length in np.random.default_rng(SEED).integers(*LENGTHS, WALKS)]


@dataclass(frozen=True)
class Shared:
    """Of successive samples' frames: how many stand at equal places from the beginning, and how many at all."""

    beginning: float
    anywhere: float
    equal_contexts: int


def shared_frames(contexts: Iterable[Sequence[tuple[int, ...]]]) -> Shared:
    """`contexts`: for each episode, the ordered frames of each of its samples."""
    beginning, anywhere, equal = [], [], 0
    for episode in contexts:
        equal += len(episode) - len(set(episode))
        for before, after in pairwise(episode):
            same = next((i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), len(before))
            beginning.append(same / len(after))
            anywhere.append(len(set(before) & set(after)) / len(after))
    return Shared(statistics.mean(beginning), statistics.mean(anywhere), equal)


def show_sharing() -> None:
    """How much of a sample's frames the one before it had already, by the length of the walks."""
    print("\nwalks                     steps   the same frames first   the same frames at all   equal contexts")
    drawn = [len(plan_walk(np.random.default_rng([SEED, i]), "hard", first_side=-1).decisions) for i in range(WALKS)]
    cases = {"demo-data, level hard": drawn, "30 to 120 steps": long_walks()}
    for name, lengths in cases.items():
        walks = [[history_positions(step, HISTORY) for step in range(length)] for length in lengths]
        shared = shared_frames(walks)
        print(
            f"{name:<24} {min(lengths):3}–{max(lengths):3} {shared.beginning:17.1%} {shared.anywhere:24.1%}"
            f" {shared.equal_contexts:16}"
        )
    late = shared_frames([[history_positions(step, HISTORY) for step in range(HISTORY + 1, 120)]])
    print(f"{'whole histories only':<24}     120 {late.beginning:17.1%} {late.anywhere:24.1%} {late.equal_contexts:16}")


def show_cpu_share(size: str, repeats: int) -> None:
    """CPU seconds of a micro-step of ours, and of VGGT's part of it."""
    with tempfile.TemporaryDirectory() as name, one_process("cpu"):
        bench = Bench(Path(name), size=SIZES[size], device="cpu", accumulation=1)
        rig = Rig(bench, OURS)
        model = rig.engine.module
        frames = rig.load()[0]["frames"][0].float() / 255
        shares = []
        for _ in range(repeats + 1):
            rig.step(timed=True)
            begun = time.process_time()
            with torch.no_grad():
                model.remember(frames)
            shares.append((time.process_time() - begun) / rig.times[-1].whole_s)
    found = sorted(shares[1:])
    print(f"\nCPU, {size}: VGGT is {statistics.median(found):.0%} ({found[0]:.0%} to {found[-1]:.0%}) of a micro-step")


if __name__ == "__main__":
    main()
