"""What benchmarks/gpu.py does with engines that fail and engines that are done; started from test_gpu.py.

Usage: python gpu_worker.py OUT
"""

from __future__ import annotations

import gc
import json
import sys
import tempfile
import time
import warnings
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import deepspeed

from benchmarks.gpu import Lever, Session, parse_arguments
from benchmarks.ways import OURS, SIZES, Bench, one_process


def is_gone_after(session: Session, zero: str) -> bool:
    """True if nothing of an engine lives on behind its `with`, though its rig is still held."""
    with session._engine(replace(OURS, zero=zero)) as built:
        assert built.rig is not None
        built.rig.step()
        parts: list[Any] = [built.rig.engine.module, built.rig.engine.optimizer.single_partition_of_fp32_groups[0]]
        lives = [weakref.ref(part) for part in parts]
        del parts
    gc.collect()
    return all(life() is None for life in lives)


def main(out: str) -> None:
    warnings.filterwarnings("ignore")
    deepspeed.utils.logger.setLevel("ERROR")
    saved: list[int] = []
    options = parse_arguments(["--workers", "0", "--steps", "1", "--warm-up", "1", "--pairs", "1", "--device", "cpu"])
    with one_process("cpu"), tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder) / "demo", size=SIZES["tiny"], device="cpu", accumulation=1)
        session = Session(
            bench, SIZES["tiny"], options, deadline=time.monotonic() + 600,
            save=lambda: saved.append(len(session.results)),
        )  # fmt: skip
        found: dict[str, Any] = {"gone": {zero: is_gone_after(session, zero) for zero in ("1", "2")}}
        # There is no such profile: the engine cannot be built.
        session._on_own_engine(Lever(name="unbuildable", off=replace(OURS, zero="9"), same_engine=False))
        # A loader that cannot be made: the first measurement fails, and the levers on that engine are left out.
        options.workers = -1
        session._on_our_engine([Lever(name="afterwards", off=replace(OURS, recompute_every=1), same_engine=True)])
    found |= {
        "problems": {result.name: result.problem for result in session.results},
        "left_out": session.left_out,
        "saved": saved,
    }
    Path(out).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
