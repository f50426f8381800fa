"""Rails judged: as sysfs has them, as ibstat has them, whether both agree, what libibverbs can open, PCIe, firmware."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from janus_cluster.preflight.hca import Port, is_up, port_name, rails, rate_gb_per_s
from janus_cluster.preflight.ibstat import parse_ibstat, parse_verbs
from janus_cluster.preflight.model import Check, CheckResult, State, worst

_SHOWN = 4
# ibstat's words for what sysfs numbers. Source: rdma-core, ibstat.c port_state_str.
_STATES = {"Down": "1: DOWN", "Initializing": "2: INIT", "Armed": "3: ARMED", "Active": "4: ACTIVE"}
_PHYS = {
    "Sleep": "1: Sleep",
    "Polling": "2: Polling",
    "Disabled": "3: Disabled",
    "PortConfigurationTraining": "4: PortConfigurationTraining",
    "LinkUp": "5: LinkUp",
    "LinkErrorRecovery": "6: LinkErrorRecovery",
    "PhyTest": "7: Phy Test",
}


def judge_hcas(
    facts: dict[str, Any], profile: dict[str, Any], *, node: str, chosen: Sequence[str] | None = None
) -> list[CheckResult]:
    """Every check of the fabric as this node shows it; SKIP where the profile wants none.

    `facts` holds hca, ibstat, verbs, peermem. `chosen` are the ports of the user's own exact NCCL_IB_HCA.
    Units: rates in Gb/s.
    """
    if not profile["wanted"]:
        check = Check(id="hca", node=node, expected="none", source=profile["source"])
        return [check.judged("SKIP", "this profile wants no InfiniBand")]
    found = rails(facts["hca"], chosen=chosen)
    return [
        _judge_sysfs(facts["hca"], found, profile, node),
        _judge_ibstat(facts["ibstat"], profile, node, chosen),
        _judge_agreement(facts["hca"], facts["ibstat"], node),
        _judge_verbs(facts["verbs"], found, node),
        _judge_pcie(found, profile, node),
        _judge_firmware(found, node),
        _judge_peermem(facts["peermem"], node),
    ]


def describe_fault(port: Port, rate_min: float) -> str | None:
    """What is wrong with a rail; None for a sound one."""
    rate = rate_gb_per_s(port["rate"])
    wrong = []
    if port["link_layer"] != "InfiniBand":
        wrong.append(f"link layer {port['link_layer']}")
    if not is_up(port):
        wrong.append(f"{port['state']}, {port['phys_state']}")
    elif rate is None or rate < rate_min:
        wrong.append(port["rate"])
    return f"{port_name(port)} {', '.join(wrong)}" if wrong else None


def _rails_verdict(ports: Sequence[Port], profile: dict[str, Any], others: Sequence[Port]) -> tuple[State, str]:
    faults = [text for p in ports if (text := describe_fault(p, profile["rate_gb_per_s_min"]))]
    wanted, sound = profile["ports_min"], len(ports) - len(faults)
    told = [f"{sound} of {wanted} sound InfiniBand rails", *faults[:_SHOWN]]
    ethernet = [port_name(p) for p in others if p["link_layer"] == "Ethernet" and is_up(p)]
    if len(ports) < wanted and ethernet:
        told.append(f"Ethernet (RoCE), no InfiniBand: {', '.join(ethernet[:8])}")
    return ("PASS" if sound >= wanted and not faults else "FAIL"), "; ".join(told)


def _check_of_rails(check_id: str, profile: dict[str, Any], node: str) -> Check:
    expected = f">= {profile['ports_min']} ports ACTIVE, LinkUp, >= {profile['rate_gb_per_s_min']} Gb/s"
    return Check(id=check_id, node=node, expected=expected, source=profile["source"], unit="Gb/s")


def _judge_sysfs(fact: dict[str, Any], found: Sequence[Port], profile: dict[str, Any], node: str) -> CheckResult:
    check = _check_of_rails("hca.rails", profile, node)
    if not fact["ports"]:
        fix = f"on {node}: lspci | grep Mellanox; lsmod | grep mlx5_ib; is {fact['folder']} visible in the container?"
        return check.judged("FAIL", f"no port in {fact['folder']}", fix=fix)
    state, measured = _rails_verdict(found, profile, [p for p in fact["ports"] if p not in found])
    fix = f"on {node}: ibstat; down: cable, switch port, subnet manager; slow: cable; Ethernet: profile h800-ethernet"
    if len(found) > profile["ports_min"]:
        fix += "; no rail at all, but storage: name the rails, environment.variables.NCCL_IB_HCA: =mlx5_0:1,…"
    return check.judged(state, measured, fix=fix)


def from_ibstat(ports: Sequence[dict[str, str]]) -> list[Port]:
    """ibstat's ports in the kernel's words, so that one judge serves both."""
    return [
        {
            **p,
            "state": _STATES.get(p.get("state", ""), p.get("state", "not told")),
            "phys_state": _PHYS.get(p.get("phys_state", ""), p.get("phys_state", "not told")),
            "rate": p.get("rate", "not told"),
            "link_layer": p.get("link_layer", "not told"),
        }
        for p in ports
    ]


def _judge_ibstat(
    fact: dict[str, Any], profile: dict[str, Any], node: str, chosen: Sequence[str] | None
) -> CheckResult:
    check = _check_of_rails("hca.ibstat", profile, node)
    fix = f"on {node}: ibstat; echo $?"
    if fact["error"] is not None:
        missing = fact["error"].endswith("not on PATH")
        if missing:
            fix = f"on {node}: install infiniband-diags; hca.rails stands on sysfs alone"
        return check.judged("WARN" if missing else "ERROR", fact["error"], fix=fix)
    parsed = parse_ibstat(fact["text"])
    ports = from_ibstat(parsed["ports"])
    found = rails({"ports": ports}, chosen=chosen)
    state, measured = _rails_verdict(found, profile, [p for p in ports if p not in found])
    states: list[State] = [state]
    told = [measured if ports else "ibstat lists no adapter"]
    if fact["problem"]:
        panic = "ibpanic" in fact["stderr"] + fact["text"]
        states.append("FAIL" if panic else "ERROR")
        told.append(fact["problem"])
    if parsed["damaged"]:
        states.append("ERROR")
        told.append(f"not understood: {parsed['damaged'][0]}")
    return check.judged(worst(states), "; ".join(told), fix=fix)


def _judge_agreement(hca: dict[str, Any], ibstat: dict[str, Any], node: str) -> CheckResult:
    """sysfs and ibstat show the same ports in the same state; else one of them is looking at another moment or host."""
    check = Check(
        id="hca.agree", node=node, expected="sysfs and ibstat say the same", source="two readings of one thing"
    )
    if ibstat["error"] is not None:
        return check.judged("SKIP", f"nothing to compare with: {ibstat['error']}")
    kernel = {port_name(p): p for p in hca["ports"]}
    told = {port_name(p): p for p in from_ibstat(parse_ibstat(ibstat["text"])["ports"])}
    differing = [f"{name}: only in sysfs" for name in kernel if name not in told]
    differing += [f"{name}: only in ibstat" for name in told if name not in kernel]
    for name in sorted(kernel.keys() & told.keys()):
        for key in ("state", "phys_state", "link_layer", "rate"):
            a, b = kernel[name][key], told[name][key]
            if key == "rate" and not is_up(kernel[name]):
                continue
            same = rate_gb_per_s(a) == rate_gb_per_s(b) is not None if key == "rate" else a.casefold() == b.casefold()
            if not same:
                differing.append(f"{name}: {key} {a} in sysfs, {b} in ibstat")
    if not kernel and not told:
        return check.judged("FAIL", "both show no port", fix=f"on {node}: lspci | grep Mellanox")
    fix = f"on {node}: run ibstat again; a port that flaps, or /sys of another namespace"
    return check.judged(
        "FAIL" if differing else "PASS", "; ".join(differing[:_SHOWN]) or f"{len(kernel)} ports", fix=fix
    )


def _judge_verbs(fact: dict[str, Any], found: Sequence[Port], node: str) -> CheckResult:
    """A header without a device under it is no device."""
    check = Check(id="hca.verbs", node=node, expected="every rail is listed by ibv_devices", source="libibverbs")
    if fact["error"] is not None:
        missing = fact["error"].endswith("not on PATH")
        fix = f"on {node}: install ibverbs-utils" if missing else f"on {node}: ibv_devices"
        return check.judged("WARN" if missing else "ERROR", fact["error"], fix=fix)
    listed = parse_verbs(fact["text"])
    absent = sorted({p["device"] for p in found} - set(listed))
    states: list[State] = ["FAIL" if absent or not listed or not found else "PASS"]
    told = [f"{len(listed)} devices"] + ([f"without {', '.join(absent[:8])}"] if absent else [])
    if fact["problem"]:
        states.append("ERROR")
        told.append(fact["problem"])
    fix = f"on {node}: ls -l /dev/infiniband; ibv_devinfo; is rdma-core installed, and the device in the container?"
    return check.judged(worst(states), "; ".join(told), fix=fix)


def _judge_pcie(found: Sequence[Port], profile: dict[str, Any], node: str) -> CheckResult:
    """Half the lanes carry half the rate whatever the port says: x8 at 32 GT/s is 252 Gb/s."""
    width = int(profile["pcie_width_min"])
    check = Check(id="hca.pcie_width", node=node, expected=f"x{width}", source=profile["source"])
    told = {port_name(p): p.get("pcie_width") for p in found}
    narrow = [f"{name} x{w}" for name, w in told.items() if w and not (w.isdigit() and int(w) >= width)]
    unknown = [name for name, w in told.items() if not w]
    fix = f"on {node}: lspci -vv | grep -A40 Mellanox | grep LnkSta; reseat the adapter"
    if narrow:
        return check.judged("FAIL", ", ".join(narrow[:_SHOWN]), fix=fix)
    if unknown or not told:
        return check.judged("SKIP", f"sysfs does not tell the width of {', '.join(unknown[:_SHOWN]) or 'any rail'}")
    return check.judged("PASS", f"x{width} on {len(told)} rails")


def _judge_firmware(found: Sequence[Port], node: str) -> CheckResult:
    check = Check(id="hca.firmware", node=node, expected="one version on all rails", source="agreement of rails")
    versions = sorted({p.get("firmware") or "not told" for p in found})
    fix = f"on {node}: mlxfwmanager; bring all rails to one firmware"
    if not found or versions == ["not told"]:
        return check.judged("SKIP", "no rail tells its firmware")
    return check.judged("PASS" if len(versions) == 1 else "WARN", ", ".join(versions), fix=fix)


def _judge_peermem(fact: dict[str, Any], node: str) -> CheckResult:
    """Without it, and without DMA-BUF in its place, NCCL copies every message through host memory."""
    check = Check(
        id="hca.peermem", node=node, expected="module nvidia_peermem", source="NCCL user guide, GPUDirect RDMA"
    )
    if fact["module"] is None and fact.get("dma_buf"):
        told = "nvidia_peermem is not loaded; the open driver and this kernel can do without (DMA-BUF)"
        return check.judged("WARN", told, fix="see `transport`: NCCL's own log must say GDRDMA")
    if fact["module"] is None:
        return check.judged("FAIL", "nvidia_peermem is not loaded", fix=f"on {node}, as root: modprobe nvidia_peermem")
    return check.judged("PASS", f"{fact['module']} {fact['version'] or '(no version)'}")
