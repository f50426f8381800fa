"""Versions of the software that training needs, on every node and in a supported range. Nothing is imported."""

from __future__ import annotations

import importlib.util
import platform
import re
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from janus_cluster import __version__
from janus_cluster.preflight.agreement import find_reference
from janus_cluster.preflight.model import Check
from janus_cluster.preflight.sysfs import NodeRoot, read_text
from janus_cluster.run.records.verdict import CheckResult

PACKAGES = ("janus-cluster", "torch", "transformers", "deepspeed", "pydantic")
# The oldest driver of each line of CUDA. Source: NVIDIA, CUDA compatibility, minor version compatibility, table 1.
_LEAST_DRIVER = {"11": "450", "12": "525", "13": "580"}
_TORCH_CUDA = re.compile(r"^cuda(?:: [^=]+)? = '([^']+)'", re.MULTILINE)


def read_versions(root: NodeRoot) -> dict[str, str | None]:
    """Facts: versions of Python, of each package, and of the CUDA and NCCL that torch brings; None where not there."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    found |= {package: _version_of(package, root) for package in PACKAGES}
    # What runs, which need not be what is installed beside torch: job.sbatch puts the submitted code before it.
    found["janus-cluster"] = __version__
    nccl = [v for v in (_version_of(f"nvidia-nccl-cu{n}", root) for n in (13, 12, 11)) if v]
    return found | {"cuda": _torch_cuda(root), "nccl": nccl[0] if nccl else None}


def _version_of(package: str, root: NodeRoot) -> str | None:
    path = sys.path if root.packages is None else [str(root.packages)]
    found = next(iter(metadata.distributions(name=package, path=path)), None)
    return found.version if found else None


def _torch_cuda(root: NodeRoot) -> str | None:
    """The CUDA version that torch was built for, from its version.py; None for a CPU build."""
    folder = _torch_folder() if root.packages is None else root.packages / "torch"
    match = _TORCH_CUDA.search(read_text(folder / "version.py") or "") if folder else None
    return match[1] if match else None


def _torch_folder() -> Path | None:
    spec = importlib.util.find_spec("torch")
    return Path(spec.origin).parent if spec and spec.origin else None


def judge_versions(facts: Mapping[str, str | None], *, node: str, ranges: Mapping[str, Any]) -> list[CheckResult]:
    """FAIL where a package is missing, or older or newer than the profile's range (`<name>_min`, `<name>_below`)."""
    bad = [f"{name} not installed" for name in PACKAGES if not facts.get(name)]
    for name, version in facts.items():
        least, below = ranges.get(f"{name}_min"), ranges.get(f"{name}_below")
        if version and least and numbers(version) < numbers(least):
            bad.append(f"{name} {version} < {least}")
        if version and below and numbers(version) >= numbers(below):
            bad.append(f"{name} {version} >= {below}")
    limits = [f"{k.removesuffix('_min')} >= {v}" for k, v in ranges.items() if k.endswith("_min")]
    check = Check(
        id="versions",
        node=node,
        expected=f"{', '.join(limits)}; {', '.join(PACKAGES)} installed",
        source="templates/preflight",
    )
    measured = ", ".join(f"{k} {v}" for k, v in facts.items() if v)
    cuda = Check(id="versions.cuda", node=node, expected="torch built for CUDA", source="templates/preflight")
    without = f"torch {facts.get('torch')} is a build without CUDA"
    cuda_fix = f"on {node}: install a torch that was built for CUDA into environment.python"
    return [
        *([cuda.judged("WARN", without, fix=cuda_fix)] if _lacks_cuda(facts, ranges) else []),
        check.judged(
            "FAIL" if bad else "PASS",
            ", ".join(bad) or measured,
            fix=f"on {node}: pip install 'janus-cluster[train]' into environment.python",
        ),
    ]


def judge_driver(facts: Mapping[str, str | None], gpus: Mapping[str, Any], *, node: str) -> list[CheckResult]:
    """WARN where the driver is older than torch's CUDA requires; all_reduce shows whether a cuda-compat package helps.

    Nothing where either is unknown: other checks report that.
    """
    drivers = sorted({row.get("driver_version", "") for row in gpus.get("identity", {}).get("rows", [])} - {""})
    cuda = facts.get("cuda") or ""
    least = _LEAST_DRIVER.get(cuda.partition(".")[0])
    if not drivers or not least:
        return []
    check = Check(
        id="versions.driver", node=node, expected=f"driver >= {least} for torch's CUDA {cuda}", source="NVIDIA"
    )
    bad = [driver for driver in drivers if numbers(driver) < numbers(least)]
    fix = (
        f"a torch that was built for an older CUDA (https://pytorch.org/get-started), or on {node} a driver >= {least}"
    )
    return [check.judged("WARN" if bad else "PASS", f"driver {', '.join(bad or drivers)}, CUDA {cuda}", fix=fix)]


def _lacks_cuda(facts: Mapping[str, str | None], ranges: Mapping[str, Any]) -> bool:
    return bool(ranges.get("cuda_wanted") and facts.get("torch") and not facts.get("cuda"))


def judge_same_versions(by_node: Mapping[str, Mapping[str, Any]]) -> list[CheckResult]:
    """FAIL for each node that differs from the most, of two from the first one, naming in what."""
    reference_node, _ = find_reference(by_node)
    reference = by_node[reference_node]
    results = []
    for node, facts in by_node.items():
        keys = [*reference, *(k for k in facts if k not in reference)]
        differing = [f"{k} {facts.get(k)} ≠ {reference.get(k)}" for k in keys if facts.get(k) != reference.get(k)]
        check = Check(
            id="versions.same",
            node=node,
            expected=f"as on {reference_node}",
            source="agreement of nodes",
            phase="cross_node",
        )
        results.append(
            check.judged(
                "FAIL" if differing else "PASS",
                ", ".join(differing) or "same",
                fix="use one environment for all nodes (environment.python, environment.setup)",
            )
        )
    return results


def numbers(version: str) -> tuple[int, ...]:
    """2.13.0+cpu → (2, 13, 0): the leading numbers."""
    match = re.match(r"\d+(?:\.\d+)*", version, re.ASCII)
    return tuple(int(part) for part in match[0].split(".")) if match else ()
