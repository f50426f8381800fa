"""Values of a preflight profile that a job (preflight.thresholds), or a profile that builds on it, replaces."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from janus_cluster.errors import UsageError
from janus_cluster.job.gpu_part import GpuPart
from janus_cluster.job.nearest import did_you_mean

_KEY = "preflight.thresholds."
_FLOORS = ("warn_below", "fail_below")
_SHARE_OF_FABRIC = (
    0.8  # 43 of the 50 GB/s of a rail are the floor of a pair; a ring over all ranks reaches a little less
)


def with_thresholds(
    profile: Mapping[str, Any],
    changes: Mapping[str, Any],
    *,
    name: str,
    where: str = _KEY,
    part: GpuPart | None = None,
) -> dict[str, Any]:
    """The profile `name` with the changed values; with another `part` also with the figures of that GPU.

    where: what messages put before a key: the job's key, or the profile's file that has the changes.
    Raises: UsageError for a key or a type that the profile does not have.
    """
    base = with_part(profile, part) if part else profile
    merged = _merged(base, changes, path=where, name=name)
    return _merged(_follow_rails(base, merged), changes, path=where, name=name)


def with_part(profile: Mapping[str, Any], part: GpuPart) -> dict[str, Any]:
    """The profile for nodes with another kind of GPU and the same network."""
    rows = part.gate_rows()
    merged = {**profile, **{section: {**profile[section], **row} for section, row in rows.items()}}
    hca = profile["hca"]
    floors = rows["all_reduce"]["busbw_gb_per_s"]
    if hca["wanted"]:
        limit = _SHARE_OF_FABRIC * hca["ports_min"] * hca["rate_gb_per_s_min"] / 8
        two_nodes = floors["two_nodes"] | {"fail_below": min(floors["two_nodes"]["fail_below"], limit)}
    else:
        # Between nodes the data goes over a network that is slower than any GPU.
        two_nodes = profile["all_reduce"]["busbw_gb_per_s"]["two_nodes"]
    floors = {"one_node": floors["one_node"], "two_nodes": two_nodes}
    return merged | {"all_reduce": {**profile["all_reduce"], "busbw_gb_per_s": floors}}


def fill_part(profile: Mapping[str, Any], part: GpuPart) -> dict[str, Any]:
    """A complete profile with the figures of its GPUs wherever it has none of its own."""
    rows = part.gate_rows()
    floors = rows["all_reduce"]["busbw_gb_per_s"] | profile["all_reduce"].get("busbw_gb_per_s", {})
    filled = {section: {**row, **profile[section]} for section, row in rows.items()}
    return {**profile, **filled, "all_reduce": {**profile["all_reduce"], "busbw_gb_per_s": floors}}


def _follow_rails(profile: Mapping[str, Any], merged: Mapping[str, Any]) -> dict[str, Any]:
    """The floors of bandwidth for another number or rate of rails than the profile's.

    Alone a rail is as fast as its rate. All at once they share what the node has, and so do all ranks. Floors that
    `changes` names are set again by the caller.
    """
    before, after = profile["hca"], merged["hca"]
    if not before["wanted"] or not after["wanted"]:
        return dict(merged)
    of_rate = after["rate_gb_per_s_min"] / before["rate_gb_per_s_min"]
    of_node = of_rate * after["ports_min"] / before["ports_min"]
    if of_rate == of_node == 1:
        return dict(merged)
    fabric_gb_per_s = after["ports_min"] * after["rate_gb_per_s_min"] / 8
    rails = merged["rails"] | {
        "busbw_gb_per_s": _scaled(profile["rails"]["busbw_gb_per_s"], min(of_rate, 1)),
        "together_gb_per_s": _scaled(profile["rails"]["together_gb_per_s"], min(of_node, 1)),
    }
    floors = {
        nodes: row | {"fail_below": min(row["fail_below"], _SHARE_OF_FABRIC * fabric_gb_per_s)}
        for nodes, row in profile["all_reduce"]["busbw_gb_per_s"].items()
    }
    return {**merged, "rails": rails, "all_reduce": merged["all_reduce"] | {"busbw_gb_per_s": floors}}


def _scaled(floor: Mapping[str, Any], factor: float) -> dict[str, Any]:
    if factor == 1:
        return dict(floor)
    numbers = {key: floor[key] * factor for key in ("warn_below", "fail_below") if key in floor}
    return {**floor, **numbers, "source": f"{floor['source']}; × {factor:g} for this site's rails"}


def _merged(profile: Mapping[str, Any], changes: Mapping[str, Any], *, path: str, name: str) -> dict[str, Any]:
    merged = dict(profile)
    # A row of floors may get the one that the profile leaves out.
    open_floors = dict.fromkeys(_FLOORS, 0.0) if "source" in profile and profile.keys() <= {*_FLOORS, "source"} else {}
    profile = {**open_floors, **profile}
    for key, value in changes.items():
        here = f"{path}{key}"
        if key not in profile:
            known = ", ".join(map(str, profile))
            guess = did_you_mean(str(key), [str(k) for k in profile])
            raise UsageError(f"{here}: the profile {name} has no such value{guess}", hint=f"one of: {known}")
        current = profile[key]
        if isinstance(current, Mapping) and isinstance(value, Mapping):
            merged[key] = _merged(current, value, path=f"{here}.", name=name)
        elif _is_alike(current, value):
            merged[key] = value
        else:
            wanted = _kind(current)
            message = f"{here}: {value!r} is not {wanted}; the profile {name} has {current!r}"
            raise UsageError(message, hint=f"--set {here}=…" if here.startswith(_KEY) else None)
    return merged


def _is_alike(current: Any, value: Any) -> bool:
    if current is None:
        return True  # the profile leaves it open
    if isinstance(current, bool) or isinstance(value, bool):
        return isinstance(current, bool) and isinstance(value, bool)
    if isinstance(current, int | float):
        return isinstance(value, int | float) and value >= 0
    return type(current) is type(value)


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, int | float):
        return "a number from 0 on"
    kinds: dict[type, str] = {str: "text", list: "a list", dict: "a mapping"}
    return kinds.get(type(value), "null")
