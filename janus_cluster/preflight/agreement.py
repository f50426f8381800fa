"""What must be the same on all nodes, as flat tables: group → key → value. Compared across nodes by the gate."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

from janus_cluster.preflight.hca import INFINIBAND, chosen_hcas, is_up, rails

Table = dict[str, str | int | None]


def collect_agreement(
    facts: dict[str, Any], *, link_layer: str = INFINIBAND, most_rails: int | None = None
) -> dict[str, Table | None]:
    """Groups versions, driver, gpus, hcas, files of one node's facts.

    link_layer: of the rails. most_rails: the job's GPUs per node; of more rails than that the others are storage.

    A group that was not read is empty; one whose program gave no output is None and never counts as equal.
    """
    groups: dict[str, Table | None] = {"versions": dict(facts["versions"])}
    identity = facts.get("gpu", {}).get("identity", {})
    rows = identity.get("rows", [])
    groups["driver"] = {"driver": ", ".join(sorted({row.get("driver_version", "?") for row in rows})) or None}
    groups["gpus"] = {f"gpu{row.get('index')}": f"{row.get('name')}, {row.get('memory.total')}" for row in rows}
    if "gpu" in facts and not rows:
        groups["driver"] = groups["gpus"] = None
    if "hca" in facts:
        groups["hcas"] = describe_rails(facts, link_layer=link_layer, most=most_rails)
    groups["files"] = {
        f"{check_id}.{key}": fact["view"][key]
        for check_id, fact in facts["paths"]["paths"].items()
        if "view" in fact
        for key in fact["view"]
    }
    return groups


def find_reference(tables: Mapping[str, Mapping[str, Any]]) -> tuple[str, bool]:
    """(the first node of those that agree and are the most, whether they are more than half of three or more).

    Where they are, who differs from them is the odd one; of two that differ neither is known to be right. Times of
    change do not count: a copy is as good as the original.
    """
    texts = {
        node: json.dumps({k: v for k, v in table.items() if not k.endswith(".mtime")}, sort_keys=True, default=str)
        for node, table in tables.items()
    }
    text, count = Counter(texts.values()).most_common(1)[0]
    return next(node for node, own in texts.items() if own == text), len(tables) > 2 and 2 * count > len(tables)


def describe_rails(facts: dict[str, Any], *, link_layer: str, most: int | None) -> Table:
    """How many rails of which rate are up, their firmware and PCIe. The names of the HCAs may differ between nodes."""
    chosen = chosen_hcas(facts.get("environ", {}), {})
    up = [p for p in rails(facts["hca"], chosen=chosen, link_layer=link_layer) if is_up(p)]
    counts = Counter(p["rate"] for p in up)
    table: Table = {f"rails of {rate}": min(n, most or n) for rate, n in sorted(counts.items())}
    links = sorted({f"x{p['pcie_width']} at {p.get('pcie_speed')}" for p in up if p.get("pcie_width")})
    versions = sorted({str(p.get("firmware")) for p in up})
    return {**table, "firmware": ", ".join(versions), "pcie": ", ".join(links)} if up else {}
