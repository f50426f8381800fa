"""Reading weights at a real size: seconds, bytes from the disk, memory that a rank has to itself.

    python -m benchmarks.weights FOLDER [--layers 1] [--rounds 3] [--keep]

Writes a checkpoint of Qwen2.5-VL-3B's widths with fewer layers (hub layout, bf16, shards of 1 GB) and half of VGGT-1B
in fp32 into FOLDER, random values, 4 GB; loads them as training does, reads every page as a copy to a GPU would, and
removes them. Cold: the files are dropped from the page cache first, as far as the kernel follows posix_fadvise. Ahead:
cold, with node/read_ahead.py beside the ranks' imports. Private: Private_Dirty of smaps_rollup above what the process
had before, every 20 ms; pages of a file that several ranks map are in no rank's. Units: GB are 1e9 bytes; loading is
the slowest rank's, whole from the first process's start to the last rank's loaded model, imports included.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path

from janus_cluster.node.read_ahead import read_files

SHARD_BYTES = 1_000_000_000
VGGT_LAYERS = 12
# Ranks of one node, file cache, ZeRO stage.
CASES = (
    (1, "cold", 0),
    (1, "warm", 0),
    (2, "cold", 0),
    (2, "ahead", 0),
    (2, "warm", 0),
    (1, "warm", 3),
    (2, "warm", 3),
)


def main() -> None:
    """One line a case."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.weights", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--keep", action="store_true", help="leave the checkpoint there")
    parser.add_argument("--rank", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank is not None:
        _load_as_rank(args.folder, args.rank)
        return
    made = not args.folder.exists()
    try:
        if made:
            write_checkpoint(args.folder, layers=args.layers)
        size_gb = sum(path.stat().st_size for path in weight_files(args.folder)) / 1e9
        print(f"{size_gb:.2f} GB in {len(weight_files(args.folder))} files, CPU, bf16")
        print("ranks  cache  ZeRO  loading s  whole s  GB from disk   private GB while loading (after), by rank")
        for ranks, cache, stage in CASES * args.rounds:
            print(measure(args.folder, ranks=ranks, cache=cache, stage=stage), flush=True)
    finally:
        if made and not args.keep:
            shutil.rmtree(args.folder, ignore_errors=True)


def weight_files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.safetensors"))


def measure(folder: Path, *, ranks: int, cache: str, stage: int) -> str:
    """A line of the table."""
    for path in weight_files(folder):
        if cache != "warm":
            drop(path)
    if cache == "warm":
        read_files(weight_files(folder))
    port = str(20_000 + os.getpid() % 20_000)
    environ = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    environ |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "WORLD_SIZE": str(ranks)}
    if cache == "ahead":
        ahead = [sys.executable, "-m", "janus_cluster.node.read_ahead", str(os.getpid())]
        subprocess.Popen([*ahead, *map(str, weight_files(folder))])
    argv = [sys.executable, "-m", "benchmarks.weights", str(folder), "--rank"]
    begun = time.perf_counter()
    processes = [
        subprocess.Popen(
            [*argv, f"{rank}:{stage}"],
            env=environ | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    said = [process.communicate()[0].strip().splitlines()[-1] for process in processes]
    found = [json.loads(line) for line in said]
    whole_s = time.perf_counter() - begun
    memory = ", ".join(f"{f['peak_gb']:.2f} ({f['after_gb']:.2f})" for f in found)
    read_gb = sum(f["read_gb"] for f in found)
    seconds = max(f["seconds"] for f in found)
    return f"{ranks:>5}  {cache:<5}  {stage:>4}  {seconds:9.1f}  {whole_s:7.1f}  {read_gb:12.2f}   {memory}"


def drop(path: Path) -> None:
    """The file's pages are out of the page cache, where nobody maps them."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def _load_as_rank(folder: Path, place: str) -> None:
    import deepspeed
    import torch
    from transformers.integrations import HfDeepSpeedConfig
    from transformers.utils import logging as transformers_logging

    from janus_cluster.config.schema import Model, Training
    from janus_cluster.training.kernels import skip_unused_kernels
    from janus_cluster.training.model.build import build_model
    from janus_cluster.training.model.presets import TokenizerIds

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    skip_unused_kernels()
    stage = int(place.partition(":")[2])
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    # transformers looks for it while it lives.
    config = {"bf16": {"enabled": True}, "zero_optimization": {"stage": stage}, "train_micro_batch_size_per_gpu": 1}
    handle = HfDeepSpeedConfig(config)
    ids = TokenizerIds(
        vocab_size=151_665, image_token_id=151_655, video_token_id=151_656, vision_start_token_id=151_652,
        vision_end_token_id=151_653, pad_token_id=151_643, eos_token_id=151_645,
    )  # fmt: skip
    torch.distributed.barrier()
    before, read_before = private_bytes(), bytes_from_disk()
    peak = _Peak()
    peak.start()
    begun = time.perf_counter()
    model = build_model(
        Model(preset="tiny", path=str(folder), vggt_path=str(folder / "vggt")),
        Training(),
        tokenizer_ids=ids,
        device="cpu",
        dtype=torch.bfloat16,
        seed=0,
    )
    for tensor in (*model.parameters(), *model.vggt.parameters()):
        # What a copy to a GPU would do: every page is read. Under ZeRO-3 that was done.
        tensor.view(torch.uint8).max() if tensor.numel() else None
    seconds = time.perf_counter() - begun
    peak.stop()
    values = {
        "seconds": seconds,
        "read_gb": (bytes_from_disk() - read_before) / 1e9,
        "peak_gb": (peak.most - before) / 1e9,
        "after_gb": (private_bytes() - before) / 1e9,
    }
    del model, handle
    print(json.dumps(values), flush=True)
    torch.distributed.barrier()
    os._exit(0)


class _Peak(threading.Thread):
    """The most private memory that was seen while it ran."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most, self._over = 0, threading.Event()

    def run(self) -> None:
        while not self._over.wait(0.02):
            self.most = max(self.most, private_bytes())

    def stop(self) -> None:
        self._over.set()
        self.join()
        self.most = max(self.most, private_bytes())


def private_bytes() -> int:
    """Memory of this process that no file on disk backs and nobody shares."""
    return _field(Path("/proc/self/smaps_rollup"), "Private_Dirty:") * 1024


def bytes_from_disk() -> int:
    return _field(Path("/proc/self/io"), "read_bytes:")


def _field(path: Path, name: str) -> int:
    return next(int(line.split()[1]) for line in path.read_text().splitlines() if line.startswith(name))


def write_checkpoint(folder: Path, *, layers: int) -> None:
    """`folder` holds a Qwen2.5-VL of 3B's widths, `folder`/vggt half of VGGT-1B."""
    from janus_cluster.config.networks import PRESETS, VggtConfig
    from janus_cluster.config.weight_names import OWN_PREFIXES, janus_shapes, name_on_disk, vggt_shapes

    preset = PRESETS["qwen2.5-vl-3b"]
    vggt = VggtConfig(depth=VGGT_LAYERS, dino_depth=VGGT_LAYERS)
    config = {
        "model_type": "qwen2_5_vl", "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        **preset.text, "num_hidden_layers": layers, "vision_config": preset.vision, "tie_word_embeddings": True,
        "image_token_id": 151_655, "video_token_id": 151_656, "vision_start_token_id": 151_652,
        "vision_end_token_id": 151_653, "vggt_config": vggt.to_dict(),
    }  # fmt: skip
    (folder / "vggt").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    shapes = janus_shapes(config)
    hub = {name_on_disk(name): shape for name, shape in shapes.items() if not name.startswith(OWN_PREFIXES)}
    _write_shards(folder, hub, bytes_each=2)
    _write_shards(folder / "vggt", vggt_shapes(vggt), bytes_each=4)


def _write_shards(folder: Path, shapes: dict[str, tuple[int, ...]], *, bytes_each: int) -> None:
    import torch
    from safetensors.torch import save_file

    dtype = torch.bfloat16 if bytes_each == 2 else torch.float32
    noise = (torch.randn(1 << 22) * 0.02).to(dtype)
    shards: list[list[str]] = [[]]
    held = 0
    for name, shape in shapes.items():
        held += torch.Size(shape).numel() * bytes_each
        if held > SHARD_BYTES and shards[-1]:
            shards.append([])
            held = torch.Size(shape).numel() * bytes_each
        shards[-1].append(name)
    if len(shards) == 1 or bytes_each == 4:
        shards = [[name for shard in shards for name in shard]]
    weight_map = {}
    for number, names in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {name: _filled(noise, shapes[name]) for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _filled(noise, shape: Iterable[int]):  # type: ignore[no-untyped-def]
    import torch

    size = torch.Size(tuple(shape))
    repeats = -(-size.numel() // noise.numel())
    return noise.repeat(repeats)[: size.numel()].reshape(size).contiguous().clone()


if __name__ == "__main__":
    main()
