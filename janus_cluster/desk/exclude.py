"""Which nodes a submission avoids: those that the user excludes, and those recorded as bad. Pure."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from janus_cluster.desk.bad_nodes import NodeRecord
from janus_cluster.run.times import render_age
from janus_cluster.slurm.commands import parse_hostlist


@dataclass(frozen=True, kw_only=True)
class Exclusion:
    """`option` is sbatch's --exclude, None for none; `notes` are lines for the user."""

    option: str | None
    added: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def merge_hosts(*lists: str | None) -> str | None:
    """One host list of several, as sbatch --exclude takes it; duplicates in later lists are left out."""
    merged: list[str] = []
    seen: set[str] = set()
    for text in lists:
        hosts = parse_hostlist(text or "")
        if hosts and not set(hosts) <= seen:
            # The text as it was written is kept where possible: h800-[01-64] is shorter than its names.
            merged += [str(text)] if not set(hosts) & seen else [h for h in hosts if h not in seen]
            seen |= set(hosts)
    return ",".join(merged) or None


def decide_exclusion(
    given: str | None,
    remembered: Sequence[NodeRecord],
    *,
    num_nodes: int,
    site_nodes: Collection[str] | None,
    now: float,
    wanted: str | None = None,
    is_gated: bool = True,
) -> Exclusion:
    """`given` and the recorded nodes; of these as many as the job can spare, the oldest record is used first.

    `site_nodes` are the names of the nodes that the job could get, None where they are unknown. A site of two nodes
    must
    be able to run a job of two: then the gate judges the recorded node once more, and a note is shown. `wanted` is
    the job's own --nodelist: a node that was requested by name is used.
    """
    if "/" in (given or ""):
        # sbatch takes a path for a file of names, only if no names follow.
        return Exclusion(option=given)
    excluded = set(parse_hostlist(given or "")) | set(parse_hostlist(wanted or ""))
    open_ones = [r for r in remembered if r.node not in excluded]
    used_again: list[NodeRecord] = []
    if site_nodes is not None:
        open_ones = [r for r in open_ones if r.node in site_nodes]
        spare = len(set(site_nodes) - set(parse_hostlist(given or ""))) - num_nodes
        by_age = sorted(open_ones, key=lambda r: r.time, reverse=True)
        kept = by_age[: max(0, spare)]
        used_again = [r for r in open_ones if r not in kept]
        open_ones = [r for r in open_ones if r in kept]
    notes = [f"{r.node} is left out: {r.kind}: {r.reason}, {render_age(r.time, now=now)}" for r in open_ones]
    judge = "the gate judges it again" if is_gated else "and no gate will judge it"
    notes += [
        f"{r.node} is recorded as bad ({r.kind}: {r.reason}, {render_age(r.time, now=now)}), but without it fewer "
        f"than {num_nodes} nodes are left: not left out, {judge}"
        for r in used_again
    ]
    if notes:
        names = ",".join(r.node for r in (*open_ones, *used_again))
        notes.append(f"janus-cluster nodes forgive {names.replace(',', ' ')} lifts it")
    option = merge_hosts(given, ",".join(r.node for r in open_ones))
    return Exclusion(option=option, added=tuple(r.node for r in open_ones), notes=tuple(notes))
