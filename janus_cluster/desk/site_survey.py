"""What `init` finds out about a site: its Slurm, its disks, and one node's GPUs and network."""

from __future__ import annotations

import getpass
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from janus_cluster.errors import JanusError, SlurmUnavailable, UsageError
from janus_cluster.job.walltime import parse_walltime_min
from janus_cluster.preflight.survey import find_peer, parse_survey, read_survey
from janus_cluster.preflight.sysfs import NodeRoot
from janus_cluster.slurm.commands import Slurm
from janus_cluster.slurm.survey import (
    Association,
    Partition,
    ask_associations,
    ask_config,
    ask_partitions,
    run_on_one_node,
)

# How long srun waits for a free node; a probe is worth no place in the queue.
_WAIT_S = 60
# A client that does not answer in this time is reported; init asks several questions.
_ASK_S = 20.0
_MAX_WALLTIME_MIN = 24 * 60
# File systems that the nodes of a cluster share.
_SHARED = frozenset(
    ["nfs", "nfs4", "lustre", "gpfs", "beegfs", "ceph", "wekafs", "panfs", "afs", "cifs", "smb3", "9p", "virtiofs",
     "fuse.juicefs", "fuse.glusterfs", "fuse.ceph", "fuse.beegfs", "orangefs"]
)  # fmt: skip
_LEAST_FREE_GB = 500  # a few checkpoints of the 7B model with its optimizer: 116 GB each


@dataclass(kw_only=True)
class SiteFacts:
    """What is known of the site. `unknown`: what could not be found out, each with the reason."""

    found: list[tuple[str, str]] = field(default_factory=list)
    unknown: list[tuple[str, str]] = field(default_factory=list)
    partition: Partition | None = None
    account: str | None = None
    walltime: str | None = None
    runs_dir: Path | None = None
    node: Mapping[str, Any] | None = None


def survey_site(*, partition: str | None, probes: bool, environ: Mapping[str, str], cwd: Path) -> SiteFacts:
    """Everything that can be found out; with `probes` also what one node shows. Nothing is written.

    Raises: UsageError for a partition that there is not; JanusError where sinfo or scontrol fails.
    """
    facts = SiteFacts()
    slurm: Slurm | None = Slurm(timeout_s=_ASK_S)
    try:
        _survey_partitions(facts, Slurm(timeout_s=_ASK_S), partition)
    except SlurmUnavailable as e:
        facts.unknown.append(("slurm", e.message))
        slurm = None
    if slurm is not None:
        _survey_account(facts, slurm)
    _survey_disks(facts, environ, cwd)
    if probes:
        _probe(facts, slurm)
    else:
        facts.unknown.append(("node", "GPUs and network of the nodes: add --probe, which runs on one node for seconds"))
    return facts


def _survey_partitions(facts: SiteFacts, slurm: Slurm, wanted: str | None) -> None:
    partitions = ask_partitions(slurm)
    config = ask_config(slurm)
    facts.found.append(("slurm", f"{config.get('SLURM_VERSION', '?')}, cluster {config.get('ClusterName', '?')}"))
    known = {p.name: p for p in partitions}
    if wanted is not None and wanted not in known:
        raise UsageError(f"--partition {wanted}: Slurm shows none of that name", hint=f"one of: {', '.join(known)}")
    usable = [p for p in partitions if p.is_up and p.gpus]
    chosen = known[wanted] if wanted else max(usable, key=lambda p: (p.is_default, p.num_gpu_nodes), default=None)
    if chosen is None:
        facts.unknown.append(("partition", "none that is up has GPUs in usable nodes (sinfo, GRES)"))
        return
    facts.partition = chosen
    others = [p.name for p in usable if p is not chosen]
    more = f"; also {', '.join(others)} (--partition)" if others else ""
    gpus = f"{chosen.num_gpu_nodes} nodes with {chosen.gpus.spelling}" if chosen.gpus else "no GPUs in its GRES"
    facts.found.append(("partition", f"{chosen.name}: {gpus}, limit {chosen.time_limit}{more}"))
    facts.walltime = _walltime(chosen.time_limit)


def _walltime(limit: str) -> str | None:
    """The partition's limit where it is less than the 24 hours that a job asks for; None where those fit."""
    try:
        minutes = parse_walltime_min(limit)
    except ValueError:
        return None
    return limit if minutes is not None and minutes < _MAX_WALLTIME_MIN else None


def _survey_account(facts: SiteFacts, slurm: Slurm) -> None:
    user = getpass.getuser()
    try:
        found = ask_associations(slurm, user)
    except JanusError as e:
        facts.unknown.append(("account", f"{e.message} (only sites with accounting need one)"))
        return
    partition = facts.partition.name if facts.partition else ""
    fitting = [a for a in found if a.partition in ("", partition)]
    chosen = _choose_account(fitting)
    names = sorted({a.account for a in fitting})
    if chosen is None:
        what = f"{', '.join(names)}: none is your default" if names else f"sacctmgr shows none for {user}"
        facts.unknown.append(("account", what))
        return
    facts.account = chosen.account
    others = [name for name in names if name != chosen.account]
    facts.found.append(("account", chosen.account + (f"; also {', '.join(others)}" if others else "")))


def _choose_account(found: Sequence[Association]) -> Association | None:
    defaults = [a for a in found if a.is_default]
    return defaults[0] if defaults else found[0] if len({a.account for a in found}) == 1 else None


def _survey_disks(facts: SiteFacts, environ: Mapping[str, str], cwd: Path) -> None:
    """Where runs belong: $JANUS_HOME/runs, or a writable disk that the nodes are likely to share."""
    home = environ.get("JANUS_HOME")
    if home:
        place = Path(home)
        text, is_shared = _describe_disk(place)
        facts.found.append(("runs", f"$JANUS_HOME/runs: {text}"))
        if not is_shared:
            facts.unknown.append(("runs", f"whether all nodes see {place}: its file system is not a network's"))
        return
    places = [Path(environ[name]) for name in ("SCRATCH", "WORK") if environ.get(name)]
    for place in [*places, cwd, Path(environ.get("HOME", "/"))]:
        text, is_shared = _describe_disk(place)
        if is_shared and os.access(place, os.W_OK):
            facts.runs_dir = place / "janus-runs"
            facts.found.append(("runs", f"{facts.runs_dir}: {text}"))
            return
    facts.unknown.append(("runs", "a disk that all nodes share: export JANUS_HOME=… on one, then repeat"))


def _describe_disk(place: Path) -> tuple[str, bool]:
    """(`lustre, 12000 GB free`, whether nodes share such a file system)."""
    import psutil

    # os.path: a folder that this user may not look into is as good as none.
    existing = next(p for p in [place.absolute(), *place.absolute().parents] if os.path.exists(p))  # noqa: PTH110
    mounts = {Path(m.mountpoint): m.fstype for m in psutil.disk_partitions(all=True)}
    mount = next((p for p in [existing.resolve(), *existing.resolve().parents] if p in mounts), None)
    kind = mounts[mount] if mount else "unknown file system"
    free_gb = shutil.disk_usage(existing).free / 1e9
    few = (
        f", less than a few checkpoints of the 7B model need ({_LEAST_FREE_GB} GB)" if free_gb < _LEAST_FREE_GB else ""
    )
    return f"{kind}, {free_gb:.0f} GB free{few}", kind in _SHARED


def _probe(facts: SiteFacts, slurm: Slurm | None) -> None:
    """What one node shows: through srun, or this host where there is no Slurm."""
    if slurm is None:
        facts.node = read_survey(NodeRoot.of(None), peer=find_peer([]))
        facts.found.append(("node", f"{facts.node['hostname']} (this host: there is no Slurm)"))
        return
    if facts.partition is None:
        facts.unknown.append(("node", "not probed: no partition to ask for a node"))
        return
    options = [f"--partition={facts.partition.name}"]
    options += [f"--gres={facts.partition.gpus.spelling}"] if facts.partition.gpus else []
    options += [f"--account={facts.account}"] if facts.account else []
    patient = replace(slurm, timeout_s=_WAIT_S + 360)
    try:
        nodes = list(slurm.usable_nodes(facts.partition.name))[:2]
        argv = [sys.executable, "-m", "janus_cluster.preflight.survey", *nodes]
        facts.node = parse_survey(run_on_one_node(patient, options, argv, wait_s=_WAIT_S))
    except JanusError as e:
        facts.unknown.append(("node", f"not probed: {e.message}"))
        return
    if facts.node is None:
        facts.unknown.append(("node", f"not probed: {sys.executable} printed no facts there: do the nodes see it?"))
    else:
        facts.found.append(("node", str(facts.node["hostname"])))
