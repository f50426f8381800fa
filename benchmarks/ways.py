"""The ways of computing a micro-step that are compared, and one of them built under a real DeepSpeed engine."""

from __future__ import annotations

import copy
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
import transformers
from PIL import Image

from benchmarks.counting import Counts, count_step
from benchmarks.predecessor import FloatDataset, SwitchableModel, collate_floats, old_zero3_config
from janus_cluster.janusvln.data.dataset import NavigationDataset, collate
from janus_cluster.janusvln.data.index import load_samples
from janus_cluster.janusvln.data.prompt import sample_texts
from janus_cluster.janusvln.data.tokenizer import build_tiny_tokenizer, tokenizer_ids
from janus_cluster.janusvln.held_out import move_to
from janus_cluster.janusvln.kernels import skip_unused_kernels
from janus_cluster.janusvln.loss import action_count, text_weight_sum
from janus_cluster.janusvln.model.attention import use_kernels_of_any_length
from janus_cluster.janusvln.model.build import mark_trainable, parameter_groups, set_recompute
from janus_cluster.janusvln.model.compile import compile_blocks
from janus_cluster.janusvln.model.presets import build_config
from janus_cluster.janusvln.model.vggt import Aggregator
from janus_cluster.job.deepspeed import resolve_ds_config
from janus_cluster.job.resources import templates_dir
from janus_cluster.job.schema import Data, JobConfig, Model, SegmentWeights, Training
from janus_cluster.modelspec.networks import PRESETS
from janus_cluster.modelspec.sizes import TINY_VOCABULARY, Sizes, sizes_of

SEED = 0
HISTORY = 8
MIXED_ROWS = 4
WORDS = ("walk", "past", "the", "grey", "sofa", "turn", "left", "at", "door", "and", "stop", "fridge", "lamp")
BUCKETS = ("reduce_bucket_size", "allgather_bucket_size", "stage3_prefetch_bucket_size")


@dataclass(frozen=True, kw_only=True)
class Way:
    """One way of computing a micro-step."""

    vggt: str = "outside, one pass"  # "inside, frame by frame" | "inside, one pass"
    zero: str = "2"  # "1" | "3" | "3, old JSON" | "no engine"
    image_mode: str = "crop"  # "pad"
    recompute_every: int = 0  # n: every n-th language layer; 0: none
    recompute_vision: bool = False
    head: str = "label positions"  # "all positions"
    vision: str = "grouped"  # "one window at a time"
    pixels: str = "uint8"  # "floats"
    compile_vggt: bool = False
    batches: str = "whole history"  # "mixed, as drawn" | "mixed, by length": several rows of one to nine frames


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


@dataclass(frozen=True, kw_only=True)
class Size:
    """A preset's widths, with depths of its own."""

    preset: str
    text_layers: int
    vision_blocks: int
    vggt_depth: int
    dino_depth: int
    image_width: int
    camera: tuple[int, int] = (160, 120)
    dtype: torch.dtype = torch.float32

    @classmethod
    def of_preset(cls, name: str, *, image_width: int, camera: tuple[int, int], dtype: torch.dtype) -> Size:
        preset = PRESETS[name]
        return cls(
            preset=name,
            text_layers=preset.text["num_hidden_layers"],
            vision_blocks=preset.vision["depth"],
            vggt_depth=preset.vggt.depth,
            dino_depth=preset.vggt.dino_depth,
            image_width=image_width,
            camera=camera,
            dtype=dtype,
        )

    @property
    def full_vision_blocks(self) -> list[int]:
        return list(range(7, self.vision_blocks, 8)) or [1]

    def configure(self, config: Any) -> Any:
        """`config` of the preset with these depths."""
        config.text_config.num_hidden_layers = self.text_layers
        config.text_config.layer_types = ["full_attention"] * self.text_layers
        config.vision_config.depth = self.vision_blocks
        config.vision_config.fullatt_block_indexes = self.full_vision_blocks
        config.vggt_config |= {"depth": self.vggt_depth, "dino_depth": self.dino_depth}
        return config


def network_sizes(size: Size) -> Sizes:
    """`size` as the plan counts it."""
    preset = PRESETS[size.preset]
    values = {
        "text_config": {"vocab_size": TINY_VOCABULARY} | preset.text | {"num_hidden_layers": size.text_layers},
        "vision_config": preset.vision
        | {"depth": size.vision_blocks, "fullatt_block_indexes": size.full_vision_blocks},
        "tie_word_embeddings": preset.tie_word_embeddings,
        "vggt_config": preset.vggt.to_dict() | {"depth": size.vggt_depth, "dino_depth": size.dino_depth},
        "vggt_merger_hidden_dim": preset.vggt_merger_hidden_dim,
    }
    return sizes_of(values, preset=preset, name=size.preset)


SIZES = {
    "tiny": Size.of_preset("tiny", image_width=84, camera=(160, 120), dtype=torch.float32),
    "small": Size(preset="tiny", text_layers=28, vision_blocks=32, vggt_depth=24, dino_depth=24, image_width=84),
}


class Bench:
    """Samples, tokenizer and sizes that all ways share."""

    def __init__(self, folder: Path, *, size: Size, device: str, accumulation: int) -> None:
        self.size, self.device, self.accumulation = size, torch.device(device), accumulation
        write_walk(folder / "walk", steps=HISTORY + MIXED_ROWS * accumulation, camera=size.camera)
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
        every = load_samples(self.data["crop"], seed=SEED).train
        # The first ones have a short history, the others a whole one.
        self.samples = every[HISTORY:]
        self.mixed = [every[i] for i in np.random.default_rng(SEED).permutation(MIXED_ROWS * accumulation)]
        self.tokenizer = build_tiny_tokenizer(sample_texts(self.samples))
        self.ids = tokenizer_ids(self.tokenizer)
        dataset = self.dataset("crop")
        labels, images, lengths = [], [], []
        for index in range(len(self.samples)):
            item = dataset[index]
            labels.append((item["labels"] != -100).sum().item())
            images.append((item["mm_token_type_ids"] == 1).sum().item())
            lengths.append(len(item["input_ids"]))
        frames = HISTORY + 1
        self.label_tokens = statistics.mean(labels)
        self.text_tokens = statistics.mean(n - k for n, k in zip(lengths, images, strict=True)) - 2 * frames

    def dataset(self, image_mode: str, *, mixed: bool = False) -> NavigationDataset:
        return NavigationDataset(
            self.mixed if mixed else self.samples,
            tokenizer=self.tokenizer,
            data=self.data[image_mode],
            segment_weights=SegmentWeights(),
        )

    def training(self, way: Way) -> Training:
        return Training(
            gradient_accumulation_steps=self.accumulation,
            gradient_checkpointing=way.recompute_every > 0,
            gradient_checkpointing_every=max(1, way.recompute_every),
            precision="bf16" if self.size.dtype == torch.bfloat16 else "fp32",
            learning_rate=1e-4,
            seed=SEED,
        )

    def ds_config(self, way: Way, model: SwitchableModel, world_size: int) -> dict[str, Any]:
        stage = way.zero[0]
        profile = json.loads((templates_dir() / "deepspeed" / f"zero{stage}.json").read_text(encoding="utf-8"))
        if way.zero == "3, old JSON":
            hidden_size = model.config.text_config.hidden_size
            num_parameters = sum(p.numel() for p in model.parameters())
            profile["zero_optimization"] = old_zero3_config(hidden_size, num_parameters)
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
        config = self.size.configure(build_config(Model(preset=self.size.preset), self.ids))
        # Made where it is to be: a real network's weights are drawn on the GPU in seconds, on the host in minutes.
        with self.device:
            model = SwitchableModel._from_config(config, dtype=self.size.dtype)
            model.attach_vggt(Aggregator(config.vggt).to(self.size.dtype))
        training = self.training(way)
        mark_trainable(model, training)
        if way.vggt != OURS.vggt:
            with self.device:
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


def write_walk(folder: Path, *, steps: int, camera: tuple[int, int]) -> None:
    """One episode of noise, with texts of usual length."""
    folder.mkdir(parents=True)
    chance = np.random.default_rng(SEED)

    def text() -> str:
        return " ".join(WORDS[i] for i in chance.integers(0, len(WORDS), 16)).capitalize() + "."

    milestones = {
        "instruction_text": text(),
        "subinstructions": [text(), text()],
        "completion_checkpoints": [{"checkpoint_frame_index": 2}],
    }
    (folder / "milestones_result.json").write_text(json.dumps(milestones))
    for step in range(steps):
        name = f"step_{step:04d}_{'STOP' if step == steps - 1 else 'MOVE_FORWARD'}"
        (folder / f"{name}.json").write_text(
            json.dumps({"landmark_description": text(), "spatial_description": text()})
        )
        pixels = chance.integers(0, 255, (camera[1], camera[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}.png")


@dataclass
class Times:
    """Seconds of one optimizer step, divided by its micro-steps: CPU time on a CPU, wall time on a GPU."""

    data_s: float
    compute_s: float
    wall_s: float

    @property
    def whole_s(self) -> float:
        return self.data_s + self.compute_s


class Collate:
    """Samples as one batch, also in loader processes."""

    def __init__(self, pad_token_id: int, *, floats: bool) -> None:
        self._pad, self._floats = pad_token_id, floats

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        batch = collate(samples, pad_token_id=self._pad)
        return collate_floats(samples, batch) if self._floats else batch


class PlainEngine:
    """What DeepSpeed's engine does in fp32 on one process, on plain torch: accumulate, clip, step."""

    def __init__(self, model: SwitchableModel, optimizer: torch.optim.Optimizer, *, accumulation: int) -> None:
        self.module, self._optimizer, self._accumulation = model, optimizer, accumulation
        self._micro_steps, self._norm = 0, 0.0

    def __call__(self, **batch: Any) -> Any:
        return self.module(**batch)

    def backward(self, loss: torch.Tensor) -> None:
        (loss / self._accumulation).backward()  # type: ignore[no-untyped-call]

    def step(self) -> None:
        self._micro_steps += 1
        if self._micro_steps % self._accumulation == 0:
            trained = [p for group in self._optimizer.param_groups for p in group["params"]]
            self._norm = float(torch.nn.utils.clip_grad_norm_(trained, Training().max_grad_norm))
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)

    def get_global_grad_norm(self) -> float:
        return self._norm

    def destroy(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)


class Rig:
    """One way, built, under its own engine."""

    def __init__(self, bench: Bench, way: Way) -> None:
        self.bench, self.way = bench, way
        self.mixed = way.batches != OURS.batches
        ours = bench.dataset(way.image_mode, mixed=self.mixed)
        floats = way.pixels == "floats"
        self.dataset: Any = ours
        if floats:
            self.dataset = FloatDataset(ours, tokenizer=bench.tokenizer, data=bench.data[way.image_mode])
        self.collate = Collate(bench.tokenizer.pad_token_id, floats=floats)
        model = bench.build_model(way)
        training = bench.training(way)
        groups = parameter_groups(model, training)
        optimizer = torch.optim.AdamW(groups, fused=bench.device.type == "cuda")
        self.engine: Any
        if way.zero == "no engine":
            self.engine = PlainEngine(model, optimizer, accumulation=bench.accumulation)
        else:
            config = copy.deepcopy(bench.ds_config(way, model, dist.get_world_size()))
            self.engine, *_ = deepspeed.initialize(model=model, config=config, optimizer=optimizer)
        self.number = 0
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.times: list[Times] = []

    def load(self) -> list[dict[str, Any]]:
        """The micro-batches of the next optimizer step."""
        per_step = self.bench.accumulation
        if self.mixed:
            lengths = [len(sample.frames) for sample in self.bench.mixed]
            by_length = sorted(range(len(lengths)), key=lambda i: -lengths[i])
            chosen = by_length if self.way.batches == "mixed, by length" else list(range(len(lengths)))
            rows = [chosen[MIXED_ROWS * micro : MIXED_ROWS * (micro + 1)] for micro in range(per_step)]
        else:
            rows = [[(self.number * per_step + micro) % len(self.bench.samples)] for micro in range(per_step)]
        batches = [self.collate([self.dataset[index] for index in row]) for row in rows]
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

    def close(self) -> None:
        """The engine is gone, and under ZeRO-1 and 2 its memory too, even if this rig is still referenced.

        DeepSpeed's hooks keep a ZeRO-3 engine alive as long as the process.
        """
        engine, self.engine = self.engine, None
        engine.destroy()

    def count(self) -> Counts:
        """Counts of one optimizer step."""
        batches = self.load()
        return count_step(lambda: self.compute(batches))


@contextmanager
def one_process(device: str) -> Iterator[None]:
    """A process group of this process alone; no port is taken."""
    if device == "cpu":
        skip_unused_kernels()
    # As training does: build_model is not what builds the networks here.
    use_kernels_of_any_length()
    backend = "nccl" if device == "cuda" else "gloo"
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=0, world_size=1)
        try:
            yield
        finally:
            dist.destroy_process_group()


def describe(module: str) -> dict[str, Any]:
    """Hardware, versions, command."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "cpu": next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "?"),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "gpu_memory_gb": torch.cuda.get_device_properties(0).total_memory / 1e9 if torch.cuda.is_available() else None,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "deepspeed": deepspeed.__version__,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
        },
        "seed": SEED,
        "command": f"python -m {module} " + " ".join(sys.argv[1:]),
    }
