"""The files that `init` writes into the site's folder, from what was found out. Pure, but for the writing."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from janus_cluster.desk.site_survey import SiteFacts
from janus_cluster.errors import UsageError
from janus_cluster.job.gpu_part import GpuPart
from janus_cluster.job.load import SITE_FILE
from janus_cluster.job.profiles import load_parts, load_preflight_profile
from janus_cluster.preflight.hca import ETHERNET, is_up
from janus_cluster.preflight.site_kind import Shown, fitting_kind, read_shown
from janus_cluster.run.files import write_text_atomically

_OWN = "site"
_PLAIN = re.compile(r"[A-Za-z0-9/][A-Za-z0-9_./:-]*")
_DEFAULT_GPUS = 8
# In the order of a job file; "": keys of no section.
_SECTIONS = ("slurm", "hardware", "environment", "")


@dataclass(kw_only=True)
class SiteFiles:
    """`texts`: file → text. `next_command`: what to type once they are written."""

    texts: dict[Path, str] = field(default_factory=dict)
    next_command: str = "janus-cluster preflight --nodes 2"


def build_site_files(facts: SiteFacts, site: Path, *, now: float) -> SiteFiles:
    """site.yaml, and a profile of the site's own where no shipped one fits. Adds to `facts` what it concludes."""
    files = SiteFiles()
    keys: dict[str, tuple[str | int, str]] = {}
    parts = load_parts(site)
    if facts.partition is not None:
        keys["slurm.partition"] = (facts.partition.name, "")
    if facts.account is not None:
        keys["slurm.account"] = (facts.account, "")
    if facts.walltime is not None:
        keys["slurm.time"] = (facts.walltime, "the partition's limit")
    shown = _shown(facts)
    part = next((name for name, p in parts.items() if shown is not None and p.name == shown.gpu), None)
    keys |= _gpu_keys(facts, part, parts)
    if shown is not None and shown.gpu is not None:
        keys |= _network_keys(facts, shown, part, site, files, now=now)
    if facts.runs_dir is not None:
        keys["runs_dir"] = (str(facts.runs_dir), "")
    if keys:
        files.texts = {site / SITE_FILE: render_site_yaml(keys, now=now), **files.texts}
    return files


def _shown(facts: SiteFacts) -> Shown | None:
    """What the probed node shows; adds it, or why it shows nothing, to `facts`."""
    if facts.node is None:
        return None
    table = facts.node["gpu"]["identity"]
    shown = read_shown(facts.node, gpus_per_node=len(table["rows"]))
    if shown.gpu is None:
        reason = table["error"] or table["problem"] or "; ".join(table["damaged"][:1]) or "GPUs of different names"
        facts.unknown.append(("GPUs", f"{facts.node['hostname']}: {reason}"))
        return shown
    facts.found.append(("GPUs", f"{len(table['rows'])} × {shown.describe()}"))
    if interface := facts.node["route"]["interface"]:
        facts.found.append(("interface", f"{interface} (each job finds it again, on each node)"))
    return shown


def _gpu_keys(facts: SiteFacts, part: str | None, parts: Mapping[str, GpuPart]) -> dict[str, tuple[str | int, str]]:
    """hardware.gpu_type, and slurm.gres where Slurm spells it otherwise."""
    keys: dict[str, tuple[str | int, str]] = {}
    gres = facts.partition.gpus if facts.partition else None
    if gres is None:
        return {"hardware.gpu_type": (part, "")} if part else {}
    words = re.split(r"[^a-z0-9]+", (gres.type or "").lower())
    name = part or next((p for p in parts if p in words), None)
    if name is None:
        facts.unknown.append(("GPUs", f"figures of {gres.type or 'GPUs without a type'} for plan and gate"))
    keys["hardware.gpu_type"] = (name or gres.type or "", "")
    if gres.num != _DEFAULT_GPUS:
        keys["hardware.gpus_per_node"] = (gres.num, "")
    if name is not None and gres.type != name:
        keys["slurm.gres"] = (gres.spelling, "as this Slurm spells it")
    return keys


def _network_keys(
    facts: SiteFacts, shown: Shown, part: str | None, site: Path, files: SiteFiles, *, now: float
) -> dict[str, tuple[str | int, str]]:
    """environment.profile: the shipped kind, one of the site's own, or `any`."""
    if (kind := fitting_kind(shown)) is not None:
        return {"environment.profile": (kind, "fits what the node shows")}
    if part is None:
        files.next_command = "janus-cluster preflight --nodes 2 --calibrate"
        return {"environment.profile": ("any", "no figures of these GPUs: later runs are judged by a calibration")}
    if shown.layer is not None and shown.rate is None:
        facts.unknown.append(("network", "rails that are down, or differ: mend the node, or probe another one"))
        return {}
    like = "h800-ethernet" if shown.layer is None else "h800-roce" if shown.layer == ETHERNET else "h800-ib"
    hostname = (facts.node or {})["hostname"]
    head = f"# Written by janus-cluster init, {_date(now)}, from what {hostname} shows; nothing was measured.\n"
    own = f"{head}like: {like}\npart: {part}\n{_hca_lines(facts, shown, like)}"
    files.texts[site / "preflight" / f"{_OWN}.yaml"] = own
    files.texts[site / "env" / f"{_OWN}.yaml"] = f"{head}like: {like}\n"
    return {"environment.profile": (_OWN, f"no shipped profile fits: {site / 'preflight' / _OWN}.yaml")}


def _hca_lines(facts: SiteFacts, shown: Shown, like: str) -> str:
    """Number, rate and PCIe speed of the rails, where they are not those of the profile."""
    base = load_preflight_profile(like)["hca"]
    if shown.layer is None:
        return ""
    ports = [p for p in (facts.node or {})["hca"]["ports"] if is_up(p) and p["link_layer"] == shown.layer]
    speeds = {float(m[1]) for p in ports if (m := re.match(r"(\d+(?:\.\d+)?) GT/s", p.get("pcie_speed") or ""))}
    values: dict[str, Any] = {"ports_min": shown.num_rails, "rate_gb_per_s_min": shown.rate}
    values["pcie_gt_per_s_min"] = speeds.pop() if len(speeds) == 1 else base["pcie_gt_per_s_min"]
    lines = [f"  {key}: {value:g}\n" for key, value in values.items() if value != base[key]]
    return "".join(["hca:\n", *lines]) if lines else ""


def render_site_yaml(keys: Mapping[str, tuple[str | int, str]], *, now: float) -> str:
    """The defaults as a file that people edit."""
    lines = [
        f"# Defaults of this site under every job. Written by janus-cluster init, {_date(now)}; edit it freely.",
        "# A job file wins over them, then --set; janus-cluster config show has the origin of every value.",
    ]
    for section in _SECTIONS:
        own = {key.rpartition(".")[2]: row for key, row in keys.items() if key.rpartition(".")[0] == section}
        lines += [f"{section}:"] if own and section else []
        for name, (value, why) in own.items():
            entry = f"{'  ' if section else ''}{name}: {_scalar(value)}"
            lines.append(f"{entry:<34} # {why}" if why else entry)
    return "\n".join([*lines, ""])


def _scalar(value: str | int) -> str:
    text = str(value)
    return text if isinstance(value, int) or _PLAIN.fullmatch(text) else json.dumps(text, ensure_ascii=False)


def _date(now: float) -> str:
    return time.strftime("%Y-%m-%d", time.gmtime(now))


def write_site_files(files: SiteFiles, *, force: bool) -> list[str]:
    """The files are written; one that was there is kept beside it. Returns: what was done, a line for each.

    Raises: UsageError, before anything is written, where a file with other content is there and `force` is not given.
    """
    changed = {p: t for p, t in files.texts.items() if not p.exists() or _body(p.read_text("utf-8")) != _body(t)}
    there = [str(path) for path in changed if path.exists()]
    if there and not force:
        raise UsageError(
            f"{', '.join(there)}: there already, with other content; nothing was written",
            hint="janus-cluster init --force replaces it and keeps the old one as NAME.old",
        )
    done = [f"unchanged {path}" for path in files.texts if path not in changed]
    for path, text in changed.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            old = path.with_name(f"{path.name}.old")
            path.replace(old)
            done.append(f"kept      {old}")
        write_text_atomically(path, text)
        done.append(f"written   {path}")
    return done


def _body(text: str) -> str:
    """Without the comments, which have the date."""
    return "\n".join(line for line in text.splitlines() if not line.startswith("#"))
