"""Profiles of sites as data: what a sound node is (preflight), its variables (env), its kind of GPU (gpu).

A profile is named or given as a path. A name is looked for in the site's own folder, then among the shipped ones:

    $JANUS_HOME/site/<preflight|env|gpu>/<name>.yaml     templates/<preflight|env|gpu>/<name>.yaml

A file that builds on another has `like: NAME` (or a path beside it) and what differs; it may have the name of the
shipped one that it builds on.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from janus_cluster.errors import UsageError
from janus_cluster.job.gpu_part import GpuPart, parse_part
from janus_cluster.job.nearest import did_you_mean
from janus_cluster.job.resources import templates_dir
from janus_cluster.job.thresholds import fill_part, with_thresholds

Folder = Literal["preflight", "env", "gpu"]
_KEYS: Mapping[Folder, str] = {
    "preflight": "preflight.profile",
    "env": "environment.profile",
    "gpu": "hardware.gpu_type",
}
_SUFFIX = ".yaml"
# Sections whose checks name the file as the source of what is expected.
_SOURCED = ("gpu", "hca", "net")
_ENTRY_KEYS = frozenset({"name", "value", "reason", "source", "limit"})


@dataclass(frozen=True)
class _File:
    """One file of a profile: `label` is how messages name it."""

    path: Path
    label: str
    content: Any


def is_path(name: str) -> bool:
    """Whether a profile is given as a path and not by its name."""
    return "/" in name or name.endswith(_SUFFIX)


def profile_names(folder: Folder, site: Path | None = None) -> list[str]:
    """Every name that the key takes: the site's own and the shipped ones."""
    roots = [templates_dir(), *([site] if site else [])]
    return sorted({p.stem for root in roots for p in (root / folder).glob(f"*{_SUFFIX}")})


def find_profile(
    folder: Folder, name: str, *, site: Path | None = None, key: str = "", beside: Path | None = None
) -> Path:
    """The file of a profile. `beside`: the file that names it: paths are relative to it, and it is not its own `like`.

    Raises: UsageError with the names that there are.
    """
    key = key or _KEYS[folder]
    if is_path(name):
        path = (beside.parent if beside else Path()) / Path(os.path.expanduser(name))
        if not path.is_file():
            raise UsageError(f"{key}: {name}: no such file", hint=_describe_names(folder, site))
        return path
    for root in [*([site] if site else []), templates_dir()]:
        path = root / folder / f"{name}{_SUFFIX}"
        if path.is_file() and path != beside:
            return path
    known = profile_names(folder, site)
    raise UsageError(
        f"{key}: there is no profile {name!r}{did_you_mean(name, known)}", hint=_describe_names(folder, site)
    )


def load_preflight_profile(name: str, *, site: Path | None = None) -> dict[str, Any]:
    """What a sound node of this kind of site is, with the figures of its GPUs. Raises: UsageError."""
    return _compose(find_profile("preflight", name, site=site), site, seen=())


def load_env_profile(name: str, *, site: Path | None = None) -> list[dict[str, Any]]:
    """The variables of a profile, each with its origin. Raises: UsageError."""
    return list(_variables(find_profile("env", name, site=site), site, seen=()).values())


def load_part(name: str, *, site: Path | None = None, beside: Path | None = None, key: str = "") -> GpuPart:
    """The figures of one kind of GPU. Raises: UsageError."""
    file = _read(find_profile("gpu", name, site=site, beside=beside, key=key))
    return parse_part(file.content, label=file.label)


def load_parts(site: Path | None = None) -> dict[str, GpuPart]:
    """Every kind of GPU by name: the shipped ones, and the site's own in place of those of the same name."""
    return {name: load_part(name, site=site) for name in profile_names("gpu", site)}


def nearest_gate(env_profile: str, *, site: Path | None = None) -> str:
    """The preflight profile that goes with an environment profile: that of its name, or of what it builds on."""
    gates, name = profile_names("preflight", site), env_profile
    path = find_profile("env", name, site=site)
    for _ in range(8):
        if not is_path(name) and name in gates:
            return name
        content = _read(path).content
        if not isinstance(content, dict) or not isinstance(content.get("like"), str):
            break
        name = content["like"]
        path = find_profile("env", name, site=site, beside=path)
    return "h800-ib"


def _describe_names(folder: Folder, site: Path | None) -> str:
    where = f" (own ones: {site / folder}/NAME{_SUFFIX})" if site else ""
    return f"one of: {', '.join(profile_names(folder, site))}; or a path{where}"


def _read(path: Path) -> _File:
    import yaml

    label = str(path.relative_to(templates_dir().parent)) if path.is_relative_to(templates_dir()) else str(path)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as e:
        raise UsageError(f"{label}: cannot be read as YAML: {' '.join(str(e).split())}") from e
    return _File(path, label, content)


def _take_like(file: _File, folder: Folder, site: Path | None, seen: tuple[Path, ...]) -> Path | None:
    """The file that this one builds on; None for one that is complete. Raises: UsageError."""
    like = file.content.get("like")
    if like is None:
        return None
    path = find_profile(folder, str(like), site=site, key=f"{file.label}: like", beside=file.path)
    if path in seen:
        raise UsageError(f"{file.label}: like: {like}: the profiles build on each other in a circle")
    return path


def _compose(path: Path, site: Path | None, *, seen: tuple[Path, ...]) -> dict[str, Any]:
    file = _read(path)
    if not isinstance(file.content, dict):
        raise UsageError(f"{file.label}: a profile is a mapping", hint="like: h800-ib, and below it what differs")
    base = _take_like(file, "preflight", site, (*seen, path))
    own = {k: v for k, v in file.content.items() if k != "like"}
    part = None
    if own.get("part") is not None:
        part = load_part(str(own["part"]), site=site, beside=path, key=f"{file.label}: part")
    if base is not None:
        sections = {s: v for s, v in own.items() if s in _SOURCED and isinstance(v, dict)}
        named = {s: {"source": file.label, **v} for s, v in sections.items()}
        return with_thresholds(
            _compose(base, site, seen=(*seen, path)), own | named, name=base.stem, where=f"{file.label}: ", part=part
        )
    if not path.is_relative_to(templates_dir()):
        raise UsageError(
            f"{file.label}: like: must be given: the profile that this one builds on", hint="like: h800-ib"
        )
    complete = fill_part(own, part) if part else own
    return complete | {s: {"source": file.label, **complete[s]} for s in _SOURCED}


def _variables(path: Path, site: Path | None, *, seen: tuple[Path, ...]) -> dict[str, dict[str, Any]]:
    file = _read(path)
    if isinstance(file.content, list):
        return _own_entries(file, file.content)
    if not isinstance(file.content, dict) or not file.content.keys() <= {"like", "variables"}:
        raise UsageError(f"{file.label}: not a list of variables", hint="like: h800-roce, and variables: below it")
    base = _take_like(file, "env", site, (*seen, path))
    inherited = _variables(base, site, seen=(*seen, path)) if base else {}
    return inherited | _own_entries(file, file.content.get("variables") or [])


def _own_entries(file: _File, entries: Any) -> dict[str, dict[str, Any]]:
    """Name → entry of one file. Raises: UsageError naming the entry."""
    found: dict[str, dict[str, Any]] = {}
    for number, entry in enumerate(entries if isinstance(entries, list) else [entries], 1):
        if not isinstance(entry, dict) or not {"name", "value"} <= entry.keys() <= _ENTRY_KEYS:
            raise UsageError(
                f'{file.label}: variable {number}: {entry!r}: not of the form {{name: NCCL_IB_TC, value: "106"}}',
                hint=f"keys: {', '.join(sorted(_ENTRY_KEYS))}; value null leaves it unset",
            )
        found[str(entry["name"])] = {"reason": "Set in the site's profile.", **entry, "origin": file.label}
    return found
