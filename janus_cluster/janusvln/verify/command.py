"""python -m janus_cluster.janusvln.verify.command [DIR]: does this installation compute JanusVLN?

DIR (default: tests/vectors of the checkout) holds reference numbers: every <name>.json lists what its
<name>.safetensors
(or folder) contains. Each is put through the code that trains, and the largest difference of every quantity is printed
against its tolerance.
Exit codes: 0 all hold, 1 something does not, 2 no vectors in DIR, or a damaged file.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from janus_cluster.errors import JanusError, UsageError, print_error
from janus_cluster.janusvln.verify.case import Comparison, Setup
from janus_cluster.janusvln.verify.data import compare_data_pipeline
from janus_cluster.janusvln.verify.model import compare_aggregator, compare_model
from janus_cluster.job.resources import vectors_dir
from janus_cluster.run.streams import run_program
from janus_cluster.run.text import to_json

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def main(argv: Sequence[str] | None = None) -> int:
    """Every vector file of the folder was compared, and the result printed. Returns: the exit code."""
    arguments = _parse_arguments(argv)
    transformers.utils.logging.disable_progress_bar()
    try:
        arguments.folder = arguments.folder or vectors_dir()
        setup = _set_up(arguments)
        started = time.monotonic()
        results = list(compare_folder(arguments.folder, setup))
    except KeyError as error:
        print(f"error: {arguments.folder}: a sidecar or its tensors lack {error}", file=sys.stderr)
        return UsageError.exit_code
    except JanusError as error:
        return print_error(error)
    failed = [c for c in results if not c.holds]
    if arguments.json:
        print(to_json(_to_json(arguments, setup, results)))
    else:
        print(render_worst(results))
        verdict = "all hold" if not failed else f"{len(failed)} DO NOT HOLD"
        print(
            f"{len(results)} quantities, {verdict} ({_describe(setup)}, torch {torch.__version__}, "
            f"transformers {transformers.__version__}, {time.monotonic() - started:.0f} s)"
        )
    return 1 if failed else 0


def compare_folder(folder: Path, setup: Setup) -> Iterator[Comparison]:
    """Each quantity of each vector file under `folder`, compared.

    Raises: UsageError if there are no vectors, or a file is absent or is not the one that its sidecar describes.
    """
    sidecars = {path: _read_sidecar(path) for path in sorted(folder.glob("*.json"))}
    kinds = {path: _kind(sidecar) for path, sidecar in sidecars.items()}
    if not any(kinds.values()):
        raise UsageError(
            f"{folder}: holds no vectors", hint="janus-cluster verify-core without DIR takes those of the checkout"
        )
    cases = {path: sidecar for path, sidecar in sidecars.items() if kinds[path] == "case"}
    for path, sidecar in sidecars.items():
        if kinds[path] == "aggregator":
            yield from compare_aggregator(sidecar, find_tensors(path, sidecar), setup)
        elif kinds[path] == "model":
            weights = find_tensors(path, sidecar)
            own = {p.stem: (s, find_tensors(p, s)) for p, s in cases.items() if s["weights"] == weights.name}
            yield from compare_model(sidecar, weights, own, setup)
        elif kinds[path] == "data":
            yield from compare_data_pipeline(sidecar, folder / sidecar["folder"], name=path.stem)
    weights_here = {path.with_suffix(".safetensors").name for path, kind in kinds.items() if kind == "model"}
    orphans = [path.name for path, sidecar in cases.items() if sidecar["weights"] not in weights_here]
    if orphans:
        raise UsageError(f"{folder}: the weights of these cases have no sidecar here: {', '.join(orphans)}")


def render_worst(results: Sequence[Comparison]) -> str:
    """One line a quantity, with the case where it is farthest off; and every one that does not hold."""
    worst: dict[tuple[str, str], Comparison] = {}
    for comparison in results:
        key = (comparison.case.split(".", maxsplit=1)[0], comparison.quantity)
        if key not in worst or not comparison.difference <= worst[key].difference:
            worst[key] = comparison
    shown = [c for c in results if c in worst.values() or not c.holds]
    return "\n".join(str(c) for c in shown)


def _kind(sidecar: dict[str, Any]) -> str | None:
    """What a sidecar describes: aggregator, model, case, data; None for a JSON file that is no sidecar."""
    config = sidecar.get("config") or {}
    if "runs" in sidecar and "folder" in sidecar:
        return "data"
    if "weights" in sidecar and "case" in sidecar:
        return "case"
    if "text" in config and "vggt" in config:
        return "model"
    return "aggregator" if "dino_depth" in config else None


def _read_sidecar(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: cannot be read: {error}") from error
    return values if isinstance(values, dict) else {}


def find_tensors(path: Path, sidecar: dict[str, Any]) -> Path:
    """The safetensors file beside a sidecar, byte for byte the one it describes. Raises: UsageError."""
    file = path.with_suffix(".safetensors")
    try:
        found = hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError as error:
        raise UsageError(f"{file}: cannot be read: {error}") from error
    if sidecar.get("sha256", found) != found:
        raise UsageError(f"{file}: sha256 is {found}, in {path.name} {sidecar['sha256']}", hint="copy the file again")
    return file


def _set_up(arguments: argparse.Namespace) -> Setup:
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch sees no GPU here", hint="--device cpu")
    # TF32 keeps 10 bits of a factor: differences of 1e-3 that would hide real mistakes.
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    return Setup(device=torch.device(arguments.device), dtype=DTYPES[arguments.dtype], compiled=arguments.compile)


def _describe(setup: Setup) -> str:
    name = torch.cuda.get_device_name() if setup.device.type == "cuda" else "cpu"
    return f"{name}, {str(setup.dtype).removeprefix('torch.')}{', compiled' if setup.compiled else ''}"


def _to_json(arguments: argparse.Namespace, setup: Setup, results: Sequence[Comparison]) -> dict[str, Any]:
    return {
        "schema_version": 1,
        "folder": str(arguments.folder),
        "device": _describe(setup).split(",", maxsplit=1)[0],
        "dtype": arguments.dtype,
        "compile": arguments.compile,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "ok": all(c.holds for c in results),
        "quantities": [c.to_json() for c in results],
    }


def _parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m janus_cluster.janusvln.verify.command", description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float32")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_program(main)
