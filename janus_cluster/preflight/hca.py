"""InfiniBand ports as /sys/class/infiniband tells them: rails are told from Ethernet, bond and storage ports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from janus_cluster.preflight.model import CheckResult

SYSFS = Path("/sys/class/infiniband")
_FILES = ("state", "phys_state", "rate", "link_layer")


def read_hcas(root: Path = SYSFS) -> dict[str, Any]:
    """Facts: each port's state, phys_state, rate and link_layer as the kernel words them."""
    ports: list[dict[str, str]] = []
    for port in sorted(root.glob("*/ports/*")):
        fact = {"device": port.parent.parent.name, "port": port.name}
        for name in _FILES:
            try:
                fact[name] = (port / name).read_text().strip()
            except OSError as e:
                fact[name] = f"unreadable: {e.strerror}"
        ports.append(fact)
    return {"ports": ports}


def judge_hcas(facts: dict[str, Any], profile: dict[str, Any], *, node: str) -> list[CheckResult]:
    """PASS only with enough InfiniBand ports ACTIVE, LinkUp and at rate; a down Ethernet port is no fault.

    Units: rates in Gb/s.
    """
    if not profile["wanted"]:
        skip = CheckResult(
            id="hca",
            phase="static",
            node=node,
            state="SKIP",
            measured="this profile wants no InfiniBand",
            expected="none",
            threshold_source=profile["source"],
        )
        return [skip]
    rails = [p for p in facts["ports"] if p["link_layer"] == "InfiniBand"]
    good = [p for p in rails if _is_sound(p, profile["rate_gb_per_s_min"])]
    bad = [f"{p['device']}:{p['port']} {p['state']}, {p['phys_state']}, {p['rate']}" for p in rails if p not in good]
    is_sound = len(good) >= profile["ports_min"]
    return [
        CheckResult(
            id="hca",
            phase="static",
            node=node,
            state="PASS" if is_sound else "FAIL",
            measured="; ".join([f"{len(good)} sound InfiniBand ports", *bad]),
            expected=f">= {profile['ports_min']} ports ACTIVE, LinkUp, >= {profile['rate_gb_per_s_min']} Gb/s",
            threshold_source=profile["source"],
            fix="" if is_sound else f"on {node}: ibstat; check cables and the subnet manager",
        )
    ]


def _is_sound(port: dict[str, str], rate_min: float) -> bool:
    rate = port["rate"].split(" ", 1)[0]
    is_fast = rate.replace(".", "", 1).isdigit() and float(rate) >= rate_min
    return port["state"].startswith("4:") and port["phys_state"].startswith("5:") and is_fast
