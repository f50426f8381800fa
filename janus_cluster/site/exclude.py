"""Which nodes a submission keeps away from: what the user excludes, and what the site remembers. Pure."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from janus_cluster.site.nodes import NodeRecord, age_text
from janus_cluster.slurm.commands import parse_hostlist


@dataclass(frozen=True, kw_only=True)
class Exclusion:
    """`option` is sbatch's --exclude, None for none; `notes` are what the user is to know of it."""

    option: str | None
    added: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def merge_hosts(*lists: str | None) -> str | None:
    """One host list out of several, as sbatch --exclude takes it; hosts of a later one that are there are left out."""
    merged: list[str] = []
    seen: set[str] = set()
    for text in lists:
        hosts = parse_hostlist(text or "")
        if hosts and not set(hosts) <= seen:
            # The text as it was written is kept where it can be: h800-[01-64] is shorter than its names.
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
    """`given` and the remembered nodes; of these as many as the job can spare, the longest remembered used first.

    `site_nodes` are the names of the nodes that the job could get, None where nobody knows. A site of two nodes must
    be able to run a job of two: then the gate judges the remembered node once more, and the user is told. `wanted` is
    the job's own --nodelist: a node that was asked for by name is used.
    """
    if "/" in (given or ""):
        # sbatch takes a path for a file of names, and would take it for nothing else with names behind it.
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
    notes = [f"{r.node} is left out: {r.kind}: {r.reason}, {age_text(r, now=now)}" for r in open_ones]
    judge = "the gate judges it again" if is_gated else "and no gate will judge it"
    notes += [
        f"{r.node} is remembered as bad ({r.kind}: {r.reason}, {age_text(r, now=now)}), but without it fewer than "
        f"{num_nodes} nodes are left: not left out, {judge}"
        for r in used_again
    ]
    if notes:
        names = ",".join(r.node for r in (*open_ones, *used_again))
        notes.append(f"janus-cluster nodes forgive {names.replace(',', ' ')} lifts it")
    option = merge_hosts(given, ",".join(r.node for r in open_ones))
    return Exclusion(option=option, added=tuple(r.node for r in open_ones), notes=tuple(notes))
