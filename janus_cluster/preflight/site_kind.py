"""Which kind of site a node is: the shipped profile that its GPUs and rails fit, and the line that adopts it.

A node of another kind than the job's profile is judged by its own kind's figures: one line names the kind, and a fault
of the node is still found. It is no fault of the node, unless other nodes of the job are of the job's kind.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from janus_cluster.job.profiles import load_parts, load_preflight_profile, profile_names
from janus_cluster.job.resolved import ResolvedJob
from janus_cluster.job.thresholds import with_part
from janus_cluster.preflight.hca import ETHERNET, INFINIBAND, is_up, rails, rate_gb_per_s
from janus_cluster.preflight.model import Check
from janus_cluster.run.records.verdict import CheckResult, State

# A single port may be a card for management.
_FEWEST_RAILS = 2


@dataclass(frozen=True, kw_only=True)
class Shown:
    """What a node shows of its kind. gpu: the one name of all its GPUs. Units: rate in Gb/s; None where not alike."""

    gpu: str | None
    layer: str | None = None
    num_rails: int = 0
    rate: float | None = None

    def fits(self, profile: Mapping[str, Any]) -> bool:
        """Whether these are the GPUs and rails of the profile."""
        hca = profile["hca"]
        if self.gpu is None or self.gpu != profile["gpu"]["name"]:
            return False
        if not hca["wanted"]:
            return self.layer is None
        wanted = (hca["link_layer"], hca["ports_min"], hca["rate_gb_per_s_min"])
        return (self.layer, self.num_rails, self.rate) == wanted

    def describe(self) -> str:
        network = f"{self.num_rails} {_word(self.layer)} rails of {self.rate:g} Gb/s" if self.rate else "no RDMA"
        return f"{self.gpu}, {network}"


@dataclass(frozen=True, kw_only=True)
class SiteKind:
    """The kind by which a node is judged. `options`: what adopts it; empty where it is the job's own.

    trains: training works, but with other rails than the profile's, or without those that are there.
    """

    profile: Mapping[str, Any]
    shown: Shown
    name: str = ""
    options: tuple[str, ...] = ()
    trains: bool = False


def read_shown(facts: Mapping[str, Any], *, gpus_per_node: int) -> Shown:
    """What the node shows; rails that differ among each other, or are not all up, are of no kind."""
    rows = facts.get("gpu", {}).get("identity", {}).get("rows", [])
    names = {row.get("name") for row in rows}
    gpu = str(names.pop()) if len(names) == 1 and len(rows) == gpus_per_node else None
    fact = facts.get("hca") or facts.get("unused_hca") or {"ports": []}
    for layer in (INFINIBAND, ETHERNET):
        found = [p for p in rails(fact, link_layer=layer) if p["link_layer"] == layer]
        rates = {rate_gb_per_s(p["rate"]) for p in found if is_up(p)}
        if len(found) >= _FEWEST_RAILS and len(rates) == 1 and all(is_up(p) for p in found):
            return Shown(gpu=gpu, layer=layer, num_rails=len(found), rate=rates.pop())
    # A port that is there and not sound may be anything.
    has_rails = any(p["link_layer"] == INFINIBAND for p in fact["ports"])
    return Shown(gpu=gpu, layer="?" if has_rails else None)


def find_kind(facts: Mapping[str, Any], resolved: ResolvedJob) -> SiteKind:
    """The kind of this node: the job's, another shipped one, or the job's with another known kind of GPU."""
    own = resolved.preflight_thresholds
    shown = read_shown(facts, gpus_per_node=resolved.job.hardware.gpus_per_node)
    if not own["gpu"]["wanted"] or shown.gpu is None or shown.fits(own):
        return SiteKind(profile=own, shown=shown)
    name = fitting_kind(shown)
    if name is not None:
        profile = _shipped_kinds()[name]
        # The job's own limits of memory, files and so on stay.
        judged = {**own, "gpu": profile["gpu"], "hca": profile["hca"]}
        is_network_usable = not own["hca"]["wanted"] or own["hca"]["link_layer"] == shown.layer
        trains = own["gpu"]["name"] == shown.gpu and is_network_usable
        options = _adopting(resolved, name, part=profile["part"])
        return SiteKind(profile=judged, shown=shown, name=name, options=options, trains=trains)
    parts = {part.name: (name, part) for name, part in load_parts().items()}
    if shown.gpu in parts and own["gpu"]["name"] not in (None, shown.gpu):
        part_name, part = parts[shown.gpu]
        options = (f"preflight.thresholds.part={part_name}", f"hardware.gpu_type={part_name}")
        return SiteKind(profile=with_part(own, part), shown=shown, name=part.label, options=options)
    return SiteKind(profile=own, shown=shown)


@functools.cache
def _shipped_kinds() -> Mapping[str, Mapping[str, Any]]:
    """Name → profile, of those that expect GPUs of one name. Cached: a gate judges many nodes."""
    profiles = {name: load_preflight_profile(name) for name in profile_names("preflight")}
    return {name: profile for name, profile in profiles.items() if profile["gpu"].get("name")}


def reads_hcas(facts: Mapping[str, Any], profile: Mapping[str, Any]) -> bool:
    """Whether the adapters can be judged: a job whose profile wants none has read only what names the kind."""
    return "hca" in facts or not profile["hca"]["wanted"]


def fitting_kind(shown: Shown) -> str | None:
    """The shipped profile whose GPUs and rails these are."""
    return next((name for name, profile in _shipped_kinds().items() if shown.fits(profile)), None)


def _adopting(resolved: ResolvedJob, name: str, *, part: str) -> tuple[str, ...]:
    job = resolved.job
    # What the job has of its own would change the profile that is adopted.
    options = [f"environment.profile={name}"]
    if job.preflight.profile != "auto":
        options.append(f"preflight.profile={name}")
    if resolved.preflight_thresholds.get("part") != part:
        options.append(f"hardware.gpu_type={part}")
    return tuple(options)


def judge_kind(kind: SiteKind, resolved: ResolvedJob, *, node: str) -> list[CheckResult]:
    """One row that names the kind; a kind without a shipped profile is a WARN until it has a baseline of its own."""
    own = resolved.preflight_thresholds
    if not own["gpu"]["wanted"]:
        return []
    check = Check(
        id="site.kind", node=node, expected=f"the kind {resolved.preflight_profile}", source=own["hca"]["source"]
    )
    if kind.options:
        state: State = "WARN" if kind.trains else "FAIL"
        fix = f"if all nodes are as {node}: {' '.join(f'--set {option}' for option in kind.options)}"
        if own["hca"]["wanted"] and kind.shown.layer is None:
            fix += f"; else, on {node}: lspci | grep Mellanox; lsmod | grep mlx5_ib; is /sys visible in the container?"
        measured = f"{kind.shown.describe()}: another kind of site, {kind.name}"
        return [check.judged(state, measured, fix=fix, blames_node=False)]
    if own["gpu"]["name"] is None:
        return [_judge_open(check, kind.shown, own)]
    if kind.shown.gpu not in (None, own["gpu"]["name"]):
        return [check.judged("SKIP", f"{kind.shown.describe()}: no shipped profile, see gpu.model")]
    return [check.judged("PASS", resolved.preflight_profile)]


def _judge_open(check: Check, shown: Shown, own: Mapping[str, Any]) -> CheckResult:
    """A profile without figures: what is measured is compared with this site's baseline, if there is one."""
    described = shown.describe() if shown.gpu else "GPUs that are not alike"
    if own["baseline"].get("measured"):
        return check.judged("PASS", f"{described}; judged by this site's baseline")
    fix = "janus-cluster preflight --profile any --calibrate: later runs are judged by what it measures"
    return check.judged("WARN", f"{described}: no figures to judge the speed by", fix=fix)


def _word(layer: str | None) -> str:
    return "RoCE" if layer == ETHERNET else str(layer)
