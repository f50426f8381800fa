"""What must be the same on all nodes, as flat tables: group → key → value. Compared across nodes by the gate."""

from __future__ import annotations

from typing import Any

from janus_cluster.preflight.hca import port_name, rails

Table = dict[str, str | int | None]


def collect_agreement(facts: dict[str, Any]) -> dict[str, Table | None]:
    """Groups versions, driver, gpus, hcas, files of one node's facts.

    A group that was not asked for is empty; one whose program gave no answer is None: it agrees with nothing.
    """
    groups: dict[str, Table | None] = {"versions": dict(facts["versions"])}
    identity = facts.get("gpu", {}).get("identity", {})
    rows = identity.get("rows", [])
    groups["driver"] = {"driver": ", ".join(sorted({row.get("driver_version", "?") for row in rows})) or None}
    groups["gpus"] = {f"gpu{row.get('index')}": f"{row.get('name')}, {row.get('memory.total')}" for row in rows}
    if identity.get("error") is not None:
        groups["driver"] = groups["gpus"] = None
    found = rails(facts["hca"]) if "hca" in facts else []
    groups["hcas"] = {port_name(p): f"{p['rate']}, firmware {p.get('firmware')}" for p in found}
    groups["files"] = {
        f"{check_id}.{key}": fact["view"][key]
        for check_id, fact in facts["paths"]["paths"].items()
        if "view" in fact
        for key in fact["view"]
    }
    return groups
