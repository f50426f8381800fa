"""What a node does before its ranks begin, so that they begin sooner: weights read ahead, caches on its own disk."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from janus_cluster.job.load import load_job
from janus_cluster.job.resolve import resolve_job
from janus_cluster.job.resolved import ResolvedJob
from janus_cluster.job.resources import jobs_dir
from janus_cluster.node.caches import cache_variables
from janus_cluster.node.read_ahead import select_files, start_read_ahead

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
# As long as reading takes on any disk.
PATIENCE_S = 30


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """qwen/ in two shards, vggt/ in one file; no tensors are in them, only bytes."""
    for name in ("qwen", "vggt"):
        (tmp_path / name).mkdir()
    index = {"weight_map": {"a": SHARDS[0], "b": SHARDS[1]}}
    (tmp_path / "qwen" / "model.safetensors.index.json").write_text(json.dumps(index))
    for file in (*(tmp_path / "qwen" / shard for shard in SHARDS), tmp_path / "vggt" / "model.safetensors"):
        file.write_bytes(struct.pack("<Q", 2) + b"{}" + os.urandom(1 << 20))
    return tmp_path


def resolve(models: Path, *sets: str) -> ResolvedJob:
    paths = (f"model.path={models / 'qwen'}", f"model.vggt_path={models / 'vggt'}", "training.memory=manual")
    loaded = load_job(jobs_dir() / "demo.yaml", sets=[*paths, *sets], environ={})
    return resolve_job(loaded, run_dir=models, cluster="local", environ={}, cwd=models, python=sys.executable)


def names(files: list[Path]) -> list[str]:
    return [f"{file.parent.name}/{file.name}" for file in files]


def test_each_node_reads_what_its_ranks_will_map(models: Path) -> None:
    everything = [*(f"qwen/{shard}" for shard in SHARDS), "vggt/model.safetensors"]
    resolved = resolve(models, "deepspeed.profile=zero2")
    assert names(select_files(resolved, node_rank=0)) == names(select_files(resolved, node_rank=1)) == everything
    resolved = resolve(models, "deepspeed.profile=zero3")
    assert names(select_files(resolved, node_rank=0)) == everything
    assert names(select_files(resolved, node_rank=1)) == ["vggt/model.safetensors"]


def test_weights_that_are_not_there_are_left_to_loading(models: Path) -> None:
    (models / "qwen" / SHARDS[1]).unlink()
    assert names(select_files(resolve(models), node_rank=0)) == ["vggt/model.safetensors"]
    assert select_files(resolve(models, "model.path=null", "model.vggt_path=null"), node_rank=0) == []


_IN_CACHE = """
import ctypes, mmap, sys
seen = total = 0
libc = ctypes.CDLL(None)
for name in sys.argv[1:]:
    with open(name, "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    pages = -(-len(mapped) // mmap.PAGESIZE)
    flags = (ctypes.c_ubyte * pages)()
    address = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
    assert libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(len(mapped)), flags) == 0
    seen, total = seen + sum(flag & 1 for flag in flags), total + pages
print(seen, total)
"""


def pages_in_cache(files: list[Path]) -> tuple[int, int]:
    """(pages of the files that are in the page cache, pages)."""
    argv = [sys.executable, "-c", _IN_CACHE, *map(str, files)]
    seen, total = subprocess.run(argv, check=True, capture_output=True, text=True).stdout.split()
    return int(seen), int(total)


@pytest.mark.slow
def test_the_weights_are_in_the_page_cache_before_they_are_mapped(models: Path) -> None:
    resolved = resolve(models)
    files = select_files(resolved, node_rank=0)
    for file in files:
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    seen, total = pages_in_cache(files)
    if seen > total / 2:
        pytest.skip("this file system keeps its pages despite posix_fadvise")
    reader = start_read_ahead(resolved, node_rank=0)
    assert reader is not None and reader.wait(timeout=PATIENCE_S) == 0
    assert pages_in_cache(files) == (total, total)


def test_compiled_things_are_on_the_nodes_own_disk_in_a_private_folder(tmp_path: Path) -> None:
    found = {v.name: v.value for v in cache_variables({"TMPDIR": str(tmp_path), "TRITON_CACHE_DIR": "/mine"})}
    (folder,) = tmp_path.iterdir()
    assert found == {
        "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor",
        "TORCH_EXTENSIONS_DIR": f"{folder}/torch_extensions",
    }
    assert folder.stat().st_mode & 0o777 == 0o700


def test_a_folder_that_others_may_write_is_not_compiled_into(tmp_path: Path) -> None:
    cache_variables({"TMPDIR": str(tmp_path)})
    (folder,) = tmp_path.iterdir()
    folder.chmod(0o777)
    assert cache_variables({"TMPDIR": str(tmp_path)}) == []
    folder.rmdir()
    folder.symlink_to("/")
    assert cache_variables({"TMPDIR": str(tmp_path)}) == []
    assert cache_variables({"TMPDIR": str(tmp_path / "absent")}) == []
