"""What a sample costs before it reaches the device, and what an index costs: python -m benchmarks.data_pipeline

`samples` prepares the same samples (9 frames of 640×480) in three ways, each in a process of its own on one core:
  ours, crop        data.image_mode crop, the default
  ours, pad         the predecessor's pixels and tokens
  predecessor       the same steps from public packages: a white 644×644 square per image as floats for VGGT, normalised
                    and cut into patches by Qwen2VLImageProcessor with a copy of the processor; a copy of the tokenizer,
                    apply_chat_template for each turn, and a search for the answer in the ids
`index` writes episodes of six frames, indexes them, and loads the index as further ranks do.

Qwen's tokenizer is in no public package: a made-up one of as many tokens stands for it; copying it costs as much.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice, product
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from janus_cluster.config.schema import Data, SegmentWeights
from janus_cluster.training.data.index import load_samples
from janus_cluster.training.data.indexing import Share, Told

VARIANTS = ("ours, crop", "ours, pad", "predecessor")
QWEN_VOCABULARY = 151_643
STEPS = 6
WORDS = (
    "walk",
    "past",
    "the",
    "grey",
    "sofa",
    "turn",
    "left",
    "at",
    "kitchen",
    "door",
    "and",
    "stop",
    "fridge",
    "lamp",
)


def main() -> None:
    """Prints a table; `--out` keeps it too."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=12, help="samples that each way prepares")
    parser.add_argument("--episodes", type=int, default=100_000, help="episodes that are indexed; 0: none")
    parser.add_argument("--episodes-dir", type=Path, help="kept, and used again where it is there already")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", nargs=2, metavar=("WHAT", "DIR"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        what, folder = arguments.child
        print(json.dumps(run_child(what, Path(folder), arguments.samples)))
        return
    lines = [describe_machine()]
    with tempfile.TemporaryDirectory(prefix="data-pipeline-") as name:
        lines += compare_samples(Path(name), arguments.samples)
        if arguments.episodes:
            lines += measure_index(Path(name), arguments.episodes_dir or Path(name) / "episodes", arguments.episodes)
    text = "\n".join(lines) + "\n"
    print(text, end="")
    if arguments.out is not None:
        arguments.out.write_text(text, encoding="utf-8")


def describe_machine() -> str:
    """Processor, cores, and versions of what was measured."""
    cpu = next((line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), "?")
    memory = next(int(line.split()[1]) for line in _lines("/proc/meminfo") if line.startswith("MemTotal")) / 1e6
    return (
        f"{cpu}, {len(os.sched_getaffinity(0))} cores, {memory:.0f} GB, local disk; "
        f"Python {platform.python_version()}, numpy {np.__version__}, Pillow {Image.__version__}; "
        f"{time.strftime('%Y-%m-%d')}; load average {os.getloadavg()[0]:.0f}"
    )


def compare_samples(folder: Path, num_samples: int) -> list[str]:
    """One line for each way, with its ratio to the predecessor's."""
    write_walk(folder / "walk", steps=num_samples + 8)
    measured = {name: ask_child(name, folder / "walk", num_samples) for name in VARIANTS}
    base = measured["predecessor"]
    head = "one sample of 9 frames, 640×480"
    lines = [f"\n{head:<34}{'CPU s':>8}{'per s, core':>13}{'ratio':>8}{'RSS MB':>8}{'batch MB':>10}"]
    for name, found in measured.items():
        lines.append(
            f"{name:<34}{found['cpu_s']:8.3f}{1 / found['cpu_s']:13.2f}{base['cpu_s'] / found['cpu_s']:8.1f}"
            f"{found['rss_mb']:8.0f}{found['bytes'] / 1e6:10.1f}"
        )
    lines.append(f"of the predecessor's time, copying the tokenizer: {base['copy_s'] / base['cpu_s']:.0%}")
    return lines


def ask_child(what: str, folder: Path, num_samples: int) -> dict[str, float]:
    """What a process of its own measured."""
    command = [sys.executable, "-m", "benchmarks.data_pipeline", "--child", what, str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [*command, "--samples", str(num_samples)], env=environment, check=True, stdout=subprocess.PIPE, text=True
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def run_child(what: str, folder: Path, num_samples: int) -> dict[str, float]:
    """Measure one thing in this process."""
    if what == "rank":
        return measure_rank(folder)
    tokenizer = build_tokenizer()
    data = Data(roots=[str(folder)], validation_fraction=0, image_mode="crop" if what == "ours, crop" else "pad")
    samples = load_samples(data, seed=0).train[8:]
    prepare: Callable[[int], Any]
    copies = [0.0]
    if what == "predecessor":
        prepare = predecessors_way(samples, tokenizer, copies)
    else:
        from janus_cluster.training.data.dataset import NavigationDataset

        prepare = NavigationDataset(
            samples, tokenizer=tokenizer, data=data, segment_weights=SegmentWeights()
        ).__getitem__
    prepare(0)
    copies[0] = 0.0
    begun = time.process_time()
    for index in range(num_samples):
        prepared = prepare(index)
    return {
        "cpu_s": (time.process_time() - begun) / num_samples,
        "copy_s": copies[0] / num_samples,
        "rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
        "bytes": float(sum(value.numel() * value.element_size() for value in _tensors(prepared))),
    }


def predecessors_way(samples: Any, tokenizer: Any, copies: list[float]) -> Callable[[int], Any]:
    """The steps that the predecessor takes for a sample, one after the other; `copies` adds up tokenizer copies."""
    import torch
    from transformers import Qwen2VLImageProcessorPil

    from janus_cluster.training.data.prompt import render_target_parts, render_user_parts

    processor = Qwen2VLImageProcessorPil()
    template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"

    def image(path: Path) -> tuple[Any, Any]:
        own = copy.deepcopy(processor)
        picture = Image.open(path).convert("RGB")
        height = round(picture.height * (644 / picture.width) / 14) * 14
        pixels = np.asarray(picture.resize((644, height), Image.Resampling.BICUBIC))
        floats = torch.from_numpy(pixels.copy()).permute(2, 0, 1).float().div(255)
        above = (644 - height) // 2
        square = torch.nn.functional.pad(floats, (0, 0, above, 644 - height - above), value=1.0)
        sides = {"shortest_edge": 644 * 644, "longest_edge": 644 * 644}
        seen = own(square.numpy(), return_tensors="pt", do_rescale=False, size=sides)
        return seen["pixel_values"], square

    def prepare(index: int) -> Any:
        sample = samples[index]
        patches, squares = zip(*(image(path) for path in sample.frames), strict=True)
        begun = time.process_time()
        own = copy.deepcopy(tokenizer)
        copies[0] += time.process_time() - begun
        own.chat_template = template
        tag = "<|vision_start|>" + "<|image_pad|>" * 529 + "<|vision_end|>"
        user = tag.join(render_user_parts(sample.instruction, num_history=len(sample.frames) - 1))
        answer = "".join(part.text for part in render_target_parts(sample) if not part.closing)
        turns = [("system", "You are a helpful assistant."), ("user", user), ("assistant", answer)]
        ids: list[int] = []
        for role, content in turns:
            ids += own.apply_chat_template([{"role": role, "content": content}], return_dict=False)
        wanted = own.encode(answer, add_special_tokens=False)
        start = next(i for i in range(len(ids)) if ids[i : i + len(wanted)] == wanted)
        weights = torch.zeros(len(ids))
        weights[start:] = 1.0
        return [torch.tensor(ids), weights, *patches, *squares]

    return prepare


def build_tokenizer() -> Any:
    """A byte-level BPE of Qwen's size; its merges are of two and three letters, in alphabetical order."""
    from tokenizers import pre_tokenizers
    from transformers import Qwen2Tokenizer

    from janus_cluster.training.data.tokenizer import EOS, PAD, SPECIAL_TOKENS

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = list(product(alphabet, repeat=2))
    triples = ((a + b, c) for a, b, c in product(alphabet, repeat=3))
    merges = [*pairs, *islice(triples, QWEN_VOCABULARY - len(alphabet) - len(pairs))]
    vocab = {token: number for number, token in enumerate([*alphabet, *(a + b for a, b in merges)])}
    extra = [token for token in SPECIAL_TOKENS if token not in (EOS, PAD)]
    return Qwen2Tokenizer(vocab=vocab, merges=merges, eos_token=EOS, pad_token=PAD, extra_special_tokens=extra)


def measure_index(folder: Path, root: Path, episodes: int) -> list[str]:
    """Making it, checking it, opening it on another rank, counting tokens."""
    if not root.is_dir():
        write_tiny_episodes(root, episodes)
    data = Data(roots=[str(root)])
    lines: list[str] = []
    times = []
    for _ in range(2):
        begun = time.perf_counter()
        split = load_samples(data, seed=0, index_dir=folder / "index", told=Told(report=lines.append))
        times.append(time.perf_counter() - begun)
    size = sum(file.stat().st_size for file in (folder / "index").rglob("*") if file.is_file())
    rank = ask_child("rank", folder, 0)
    num = len(split.train) + len(split.held_out)
    cores = len(os.sched_getaffinity(0))
    shared = f"(and {size / 1e6:.0f} MB mapped, shared by a node's ranks)"
    files = episodes * (2 * STEPS + 1)
    return [
        f"\nindex of {episodes:,} episodes, {num:,} samples, {files:,} files",
        f"{'made by ' + str(cores) + ' processes':<44}{times[0]:8.1f} s   {num / times[0]:,.0f} samples/s",
        f"{'checked and opened again (every file)':<44}{times[1]:8.1f} s",
        f"{'opened on another rank':<44}{rank['open_s']:8.1f} s",
        f"{'memory of its own on that rank':<44}{rank['own_mb']:8.0f} MB  {shared}",
        f"{'a sample made from it':<44}{rank['sample_us']:8.0f} µs",
        f"{'token counts, counted':<44}{rank['count_s']:8.1f} s",
        f"{'token counts, read':<44}{rank['count_again_s']:8.1f} s",
    ]


def measure_rank(folder: Path) -> dict[str, float]:
    """A rank that did not make the index: opens it, makes samples, counts tokens."""
    from janus_cluster.training.data.lengths import load_token_counts

    (index,) = (folder / "index").iterdir()
    data = Data(roots=[str(folder)], max_length=100_000)  # the root's files are not looked at
    before = _own_memory_mb()
    begun = time.perf_counter()
    split = load_samples(data, seed=0, index_dir=folder, share=Share(False, lambda _: [str(index)]))
    open_s = time.perf_counter() - begun
    own_mb = _own_memory_mb() - before
    chosen = np.random.default_rng(0).integers(0, len(split.train), 5_000)
    begun = time.perf_counter()
    for number in chosen:
        split.train[int(number)]
    sample_us = (time.perf_counter() - begun) / len(chosen) * 1e6
    tokenizer = build_tokenizer()
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    counting = []
    for _ in range(2):
        begun = time.perf_counter()
        load_token_counts(split.train, tokenizer=tokenizer, data=data)
        counting.append(time.perf_counter() - begun)
    return {
        "open_s": open_s,
        "own_mb": own_mb,
        "sample_us": sample_us,
        "count_s": counting[0],
        "count_again_s": counting[1],
    }


def write_walk(root: Path, *, steps: int) -> None:
    """One episode of 640×480 frames: smooth colours under noise, about as large as a photograph as PNG."""
    chance = np.random.default_rng(0)
    ramp = np.add.outer(np.linspace(0, 120, 480), np.linspace(0, 120, 640))[:, :, None]
    write_episode(root / "walk", steps=steps, number=0)
    for path in (root / "walk").glob("*.png"):
        pixels = ramp + chance.integers(0, 255, 3) / 3 + chance.normal(0, 4, (480, 640, 3))
        Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(path)


def write_tiny_episodes(root: Path, episodes: int) -> None:
    """Episodes of six frames of 8×8 pixels, every file a file of its own."""
    for number in range(episodes):
        write_episode(root / f"episode_{number:06d}", steps=STEPS, number=number)


def write_episode(folder: Path, *, steps: int, number: int) -> None:
    """One episode folder with texts of usual length."""
    folder.mkdir(parents=True)
    texts = _texts(number)
    milestones = {
        "instruction_text": next(texts),
        "subinstructions": [next(texts), next(texts)],
        "completion_checkpoints": [{"checkpoint_frame_index": 2}],
    }
    (folder / "milestones_result.json").write_text(json.dumps(milestones))
    for step in range(steps):
        name = f"step_{step:04d}_{'STOP' if step == steps - 1 else 'MOVE_FORWARD'}"
        (folder / f"{name}.png").write_bytes(_TINY)
        described = {"landmark_description": next(texts), "spatial_description": next(texts)}
        (folder / f"{name}.json").write_text(json.dumps(described))


def _texts(seed: int) -> Iterator[str]:
    chance = np.random.default_rng(seed)
    while True:
        yield " ".join(WORDS[i] for i in chance.integers(0, len(WORDS), 16)).capitalize() + "."


def _tiny_png() -> bytes:
    with tempfile.TemporaryFile() as file:
        Image.new("RGB", (8, 8), (90, 120, 60)).save(file, "PNG")
        file.seek(0)
        return file.read()


_TINY = _tiny_png()


def _own_memory_mb() -> float:
    """Memory that no other process shares (Private_Dirty)."""
    lines = _lines("/proc/self/smaps_rollup")
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_Dirty")) / 1e3


def _tensors(prepared: Any) -> Iterator[Any]:
    values = prepared.values() if isinstance(prepared, dict) else prepared
    return (value for value in values if hasattr(value, "numel"))


def _lines(path: str) -> list[str]:
    return Path(path).read_text(encoding="utf-8", errors="replace").splitlines()


if __name__ == "__main__":
    main()
