"""Judge the rails: sysfs, ibstat, whether both agree, what libibverbs can open, PCIe width, firmware."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from janus_cluster.preflight.hca import (
    ETHERNET,
    INFINIBAND,
    NcclList,
    Port,
    is_up,
    natural,
    port_name,
    rails,
    rate_gb_per_s,
)
from janus_cluster.preflight.ibstat import parse_ibstat, parse_opened, parse_verbs
from janus_cluster.preflight.model import Check
from janus_cluster.run.records.verdict import CheckResult, State, worst

_SHOWN = 4
# A machine of the generation before, or with half the lanes; less is a fault even where all rails have it.
_LEAST_SHARE_OF_SITE = 0.5
_UMAD = re.compile(r"ib_umad|UMAD library|umad_init")
# ibstat's names for what sysfs numbers. Source: rdma-core, ibstat.c port_state_str.
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


@dataclass(frozen=True, kw_only=True)
class RailsFinding:
    """What the ports of one reading amount to. blames_node: see CheckResult."""

    state: State
    measured: str
    fix: str
    blames_node: bool = True


def judge_hcas(
    facts: dict[str, Any], profile: dict[str, Any], *, node: str, chosen: NcclList | None = None
) -> list[CheckResult]:
    """Every check of the fabric as this node shows it; SKIP where the profile requires none.

    `facts` holds hca, ibstat, verbs, peermem. `chosen` is the user's NCCL_IB_HCA. Units: rates in Gb/s.
    """
    if not profile["wanted"]:
        check = Check(id="hca", node=node, expected="none", source=profile["source"])
        return [check.judged("SKIP", "this profile wants no InfiniBand")]
    ports = facts["hca"]["ports"]
    found = rails(facts["hca"], chosen=chosen, link_layer=profile["link_layer"])
    kernel = judge_ports(ports, profile, chosen=chosen)
    verbs = _judge_verbs(facts["verbs"], found, node)
    # NCCL reads sysfs and asks libibverbs; ibstat is a second reading of the same ports.
    is_sound = kernel.state in ("PASS", "WARN") and verbs.state in ("PASS", "WARN")
    return [
        _judge_sysfs(facts["hca"], kernel, profile, node),
        _judge_ibstat(facts["ibstat"], ports, profile, node, chosen=chosen, is_sound=is_sound),
        _judge_agreement(facts["hca"], facts["ibstat"], found, node),
        verbs,
        judge_pcie(found, profile, node),
        _judge_firmware(found, node),
        _judge_peermem(facts["peermem"], node),
    ]


def describe_fault(port: Port, profile: Mapping[str, Any]) -> str | None:
    """What is wrong with a rail; None for a sound one."""
    rate = rate_gb_per_s(port["rate"])
    wrong = []
    if port["link_layer"] != profile["link_layer"]:
        wrong.append(f"link layer {port['link_layer']}")
    if not is_up(port):
        wrong.append(f"{port['state']}, {port['phys_state']}")
    elif rate is None or rate < profile["rate_gb_per_s_min"]:
        wrong.append(port["rate"])
    return f"{port_name(port)} {', '.join(wrong)}" if wrong else None


def judge_ports(ports: Sequence[Port], profile: Mapping[str, Any], *, chosen: NcclList | None) -> RailsFinding:
    """The rails among the ports: enough sound ones, and how the others are to be understood.

    Ports beside enough sound rails may be storage: WARN. Rails that are all alike, but fewer or slower than the
    profile's, are another kind of site: WARN, with what adopts it.
    """
    found = rails({"ports": ports}, chosen=chosen, link_layer=profile["link_layer"])
    faults = {port_name(p): text for p in found if (text := describe_fault(p, profile))}
    sound = [port_name(p) for p in found if port_name(p) not in faults]
    wanted, kind = profile["ports_min"], profile["link_layer"]
    measured = [f"{len(sound)} of {wanted} sound {kind} rails", *list(faults.values())[:_SHOWN]]
    absent = chosen.absent(ports) if chosen else []
    if absent:
        measured.append(f"NCCL_IB_HCA names {', '.join(absent)}, which this node does not have")
    if chosen is not None and not any(chosen.selects(p) for p in ports) and ports:
        text = f"NCCL_IB_HCA takes none of this node's ports: {', '.join(port_name(p) for p in ports[:8])}"
        unset = "leave NCCL_IB_HCA unset: the exact list is found on each node"
        return RailsFinding(state="FAIL", measured=text, fix=unset, blames_node=False)
    is_choice = chosen is not None and chosen.is_choice
    # A GPU without its rail is a fault, however many others there are.
    broken = [port_name(p) for p in found if port_name(p) in faults and (is_choice or p.get("near_gpu"))]
    fix = "ibstat; down: cable, switch port, subnet manager; slow: cable"
    if len(sound) >= wanted and not absent and not broken:
        if not faults and (is_choice or len(sound) == wanted):
            return RailsFinding(state="PASS", measured=measured[0], fix="")
        if not faults:
            measured.append(f"{len(sound) - wanted} more than wanted")
        names = ",".join(sound) if faults else "mlx5_0:1,…"
        more = f"; storage? name the rails: --set environment.variables.NCCL_IB_HCA=={names}"
        return RailsFinding(state="WARN", measured="; ".join(measured), fix=fix + more)
    if not absent and (adopted := _adopt_site(found, profile)):
        up = [p for p in found if is_up(p)]
        text = (
            f"{len(up)} rails, all alike: {up[0]['rate']}; the profile has {wanted} of "
            f"{profile['rate_gb_per_s_min']:g} Gb/s: another kind of site"
        )
        return RailsFinding(state="WARN", measured=text, fix=f"if all nodes are so: {adopted}")
    return _judge_too_few(ports, found, measured, fix, profile)


def _judge_too_few(
    ports: Sequence[Port], found: Sequence[Port], measured: list[str], fix: str, profile: Mapping[str, Any]
) -> RailsFinding:
    """FAIL; not the node's own where most of its ports are alike and of the other link layer: RoCE."""
    other = [p for p in ports if p not in found and p["link_layer"] == ETHERNET and is_up(p)]
    if profile["link_layer"] == INFINIBAND and other:
        measured.append(f"Ethernet (RoCE), no InfiniBand: {', '.join(port_name(p) for p in other[:8])}")
        fix += "; RoCE: --set environment.profile=h800-roce; without RDMA: --set environment.profile=h800-ethernet"
    is_of_site = len(other) > max(len(found), 1) and len({p["rate"] for p in other}) == 1
    if profile["link_layer"] == INFINIBAND and is_of_site:
        return RailsFinding(state="FAIL", measured="; ".join(measured), fix=fix, blames_node=False)
    if len(found) > profile["ports_min"]:
        fix += "; no rail at all, but storage: --set environment.variables.NCCL_IB_HCA==mlx5_0:1,…"
    return RailsFinding(state="FAIL", measured="; ".join(measured), fix=fix)


def _adopt_site(found: Sequence[Port], profile: Mapping[str, Any]) -> str | None:
    """The options that adopt these rails as the site's kind; None where they are not alike, or look broken."""
    up = [p for p in found if is_up(p) and p["link_layer"] == profile["link_layer"]]
    rates = {rate_gb_per_s(p["rate"]) for p in up}
    wanted, num = int(profile["ports_min"]), len(up)
    rate = next(iter(rates), None)
    # Half and a quarter of the rails: one HCA for 2 or for 4 GPUs. Seven of eight are one that is missing.
    is_kind = num >= wanted or (num == len(found) and num in (wanted // 2, wanted // 4))
    is_broken = num < 2 or any(p.get("near_gpu") for p in found if p not in up)
    if not is_kind or is_broken or len(rates) != 1 or rate is None or rate < profile["site_rate_gb_per_s_min"]:
        return None
    values = {"ports_min": num, "rate_gb_per_s_min": rate}
    changed = {key: value for key, value in values.items() if value < profile[key]}
    return " ".join(f"--set preflight.thresholds.hca.{key}={value:g}" for key, value in changed.items())


def _check_of_rails(check_id: str, profile: dict[str, Any], node: str) -> Check:
    expected = (
        f"{profile['ports_min']} {profile['link_layer']} ports ACTIVE, LinkUp, >= {profile['rate_gb_per_s_min']} Gb/s"
    )
    return Check(id=check_id, node=node, expected=expected, source=profile["source"], unit="Gb/s")


def _judge_sysfs(fact: dict[str, Any], kernel: RailsFinding, profile: dict[str, Any], node: str) -> CheckResult:
    check = _check_of_rails("hca.rails", profile, node)
    if not fact["ports"]:
        fix = f"on {node}: lspci | grep Mellanox; lsmod | grep mlx5_ib; is {fact['folder']} visible in the container?"
        return check.judged("FAIL", f"no port in {fact['folder']}", fix=fix)
    return check.judged(kernel.state, kernel.measured, fix=f"on {node}: {kernel.fix}", blames_node=kernel.blames_node)


def from_ibstat(ports: Sequence[dict[str, str]]) -> list[Port]:
    """ibstat's ports in the kernel's spelling, so that one judge serves both."""
    return [
        {
            **p,
            "state": _STATES.get(p.get("state", ""), p.get("state", "not reported")),
            "phys_state": _PHYS.get(p.get("phys_state", ""), p.get("phys_state", "not reported")),
            "rate": p.get("rate", "not reported"),
            "link_layer": p.get("link_layer", "not reported"),
        }
        for p in ports
    ]


def _judge_ibstat(
    fact: dict[str, Any],
    kernel: Sequence[Port],
    profile: dict[str, Any],
    node: str,
    *,
    chosen: NcclList | None,
    is_sound: bool,
) -> CheckResult:
    """The rails as ibstat prints them. is_sound: sysfs and libibverbs show all rails; a dying ibstat is then a WARN."""
    check = _check_of_rails("hca.ibstat", profile, node)
    fix = f"on {node}: ibstat; echo $?"
    if fact["error"] is not None:
        missing = fact["error"].endswith("not on PATH")
        if missing:
            fix = f"on {node}: install infiniband-diags; hca.rails is read from sysfs alone"
        return check.judged("WARN" if missing or is_sound else "ERROR", fact["error"], fix=fix)
    parsed = parse_ibstat(fact["text"])
    # ibstat does not print what only the kernel's tree shows.
    placed = {port_name(p): {k: p[k] for k in ("is_virtual", "near_gpu") if k in p} for p in kernel}
    ports = [p | placed.get(port_name(p), {}) for p in from_ibstat(parsed["ports"])]
    is_without_umad = _UMAD.search(fact["stderr"] + fact["text"]) is not None
    if is_without_umad:
        fix = f"on {node}, as root: modprobe ib_umad; only ibstat needs it, NCCL does not"
    if is_sound and (fact["problem"] or not ports):
        measured = fact["problem"] or "ibstat lists no adapter"
        return check.judged("WARN", f"{measured}; sysfs and ibv_devices show all rails", fix=fix)
    finding = judge_ports(ports, profile, chosen=chosen)
    states: list[State] = [finding.state]
    findings = [finding.measured if ports else "ibstat lists no adapter"]
    if fact["problem"]:
        panic = "ibpanic" in fact["stderr"] + fact["text"]
        states.append("FAIL" if panic else "ERROR")
        findings.append(fact["problem"])
    if parsed["damaged"]:
        states.append("ERROR")
        findings.append(f"not parsed: {parsed['damaged'][0]}")
    return check.judged(worst(states), "; ".join(findings), fix=fix, blames_node=finding.blames_node)


def _judge_agreement(hca: dict[str, Any], ibstat: dict[str, Any], found: Sequence[Port], node: str) -> CheckResult:
    """sysfs and ibstat show the same ports in the same state; else one was read at another time or on another host.

    ibstat need not list what is no InfiniBand CA; where it died, only what it printed before can be compared.
    """
    check = Check(id="hca.agree", node=node, expected="sysfs and ibstat agree", source="two readings of the same ports")
    parsed = parse_ibstat(ibstat["text"])
    listed = {port_name(p): p for p in from_ibstat(parsed["ports"])}
    if ibstat["error"] is not None or not listed:
        return check.judged("SKIP", f"nothing to compare with: {ibstat['error'] or 'ibstat lists no adapter'}")
    kernel = {port_name(p): p for p in hca["ports"] if p["device"] not in parsed["foreign"]}
    needed = {port_name(p) for p in [*found, *(p for p in hca["ports"] if p["link_layer"] == INFINIBAND)]}
    unlisted = [f"{name}: only in sysfs" for name in kernel if name in needed and name not in listed]
    differing = [f"{name}: only in ibstat" for name in listed if name not in kernel]
    differing += [] if ibstat["problem"] else unlisted
    for name in sorted(kernel.keys() & listed.keys()):
        for key in ("state", "phys_state", "link_layer", "rate"):
            a, b = kernel[name][key], listed[name][key]
            if key == "rate" and not is_up(kernel[name]):
                continue
            same = rate_gb_per_s(a) == rate_gb_per_s(b) is not None if key == "rate" else a.casefold() == b.casefold()
            if not same and not (ibstat["problem"] and b == "not reported"):
                differing.append(f"{name}: {key} {a} in sysfs, {b} in ibstat")
    fix = f"on {node}: run ibstat again; a port that flaps, or /sys of another namespace"
    if differing:
        return check.judged("FAIL", "; ".join(differing[:_SHOWN]), fix=fix)
    if unlisted:
        return check.judged("WARN", f"ibstat ended before: {'; '.join(unlisted[:_SHOWN])}", fix=fix)
    return check.judged("PASS", f"{len(kernel.keys() & listed.keys())} ports")


def _judge_verbs(fact: dict[str, Any], found: Sequence[Port], node: str) -> CheckResult:
    """Every rail is a device of ibv_devices, and ibv_devinfo can open it; without a rail there is nothing to open."""
    check = Check(id="hca.verbs", node=node, expected="libibverbs lists and opens every rail", source="libibverbs")
    if fact["error"] is not None:
        missing = fact["error"].endswith("not on PATH")
        fix = f"on {node}: install ibverbs-utils" if missing else f"on {node}: ibv_devices"
        return check.judged("WARN" if missing else "ERROR", fact["error"], fix=fix)
    if not found:
        return check.judged("SKIP", "no rail to look for, see hca.rails")
    listed, opened = parse_verbs(fact["text"]), fact["opened"]
    absent = sorted({p["device"] for p in found} - set(listed), key=natural)
    states: list[State] = ["FAIL" if absent else "PASS"]
    findings = [f"{len(listed)} devices"] + ([f"without {', '.join(absent[:8])}"] if absent else [])
    if fact["problem"]:
        states.append("ERROR")
        findings.append(fact["problem"])
    fix = f"on {node}: ls -l /dev/infiniband; ibv_devinfo; is rdma-core installed, and the device in the container?"
    if (opened["error"] or "").endswith("not on PATH"):
        return check.judged(worst(states), "; ".join(findings), fix=fix)
    closed = sorted({p["device"] for p in found} - {*parse_opened(opened["text"]), *absent}, key=natural)
    if opened["error"]:
        states.append("ERROR")
        findings.append(opened["error"])
    elif closed:
        states.append("FAIL")
        findings.append(f"cannot be opened: {', '.join(closed[:8])} ({opened['problem'] or 'not in ibv_devinfo'})")
    elif opened["problem"]:
        states.append("WARN")
        findings.append(f"all rails open; {opened['problem']}")
    return check.judged(worst(states), "; ".join(findings), fix=fix)


def judge_pcie(found: Sequence[Port], profile: dict[str, Any], node: str) -> CheckResult:
    """Lanes and speed of each rail against the profile's, or the part's own highest speed where that is lower.

    Half the lanes carry half the rate at any port rate: x8 at 32 GT/s is 252 Gb/s. The same half for all rails is the
    machine's kind: WARN.
    """
    width, speed = int(profile["pcie_width_min"]), float(profile["pcie_gt_per_s_min"])
    check = Check(id="hca.pcie_width", node=node, expected=f"x{width} at {speed:g} GT/s", source=profile["source"])
    links = {port_name(p): PcieLink.of(p, width=width, speed=speed) for p in found}
    slow = {name: link for name, link in links.items() if link.share < 1}
    unknown = [f"{name} {link.measured}" for name, link in links.items() if not link.is_known]
    fix = f"on {node}: lspci -vv | grep -A40 Mellanox | grep LnkSta; reseat the adapter, BIOS link speed"
    if slow:
        shares = {link.share for link in links.values()}
        is_of_site = len(slow) == len(links) > 1 and len(shares) == 1 and min(shares) >= _LEAST_SHARE_OF_SITE
        if is_of_site:
            first = next(iter(slow.values()))
            fix += (
                f"; if all nodes are so: --set preflight.thresholds.hca.pcie_width_min={first.width:g} "
                f"--set preflight.thresholds.hca.pcie_gt_per_s_min={first.speed or speed:g}"
            )
        shown = "; ".join(f"{name} {link.measured}" for name, link in list(slow.items())[:_SHOWN])
        return check.judged("WARN" if is_of_site else "FAIL", shown, fix=fix)
    if not links or all(link.width is None for link in links.values()):
        return check.judged("SKIP", f"sysfs has no width of {', '.join([*links][:_SHOWN]) or 'any rail'}")
    if unknown:
        return check.judged("WARN", "; ".join(unknown[:_SHOWN]), fix=fix)
    at = f" at {speed:g} GT/s" if all(link.speed for link in links.values()) else ", speed not in sysfs"
    return check.judged("PASS", f"x{width} on {len(links)} rails{at}")


@dataclass(frozen=True, kw_only=True)
class PcieLink:
    """One link. Units: speed GT/s per lane; None where sysfs has none. share: of what is wanted, 1 where unknown."""

    width: int | None
    speed: float | None
    share: float
    measured: str
    is_known: bool

    @classmethod
    def of(cls, port: Port, *, width: int, speed: float) -> PcieLink:
        texts = {key: port.get(key) for key in ("pcie_width", "pcie_speed", "pcie_speed_max")}
        digits = str(texts["pcie_width"])
        lanes = int(digits) if digits.isascii() and digits.isdigit() else None
        # The kernel's own numbers for a width that it does not know.
        lanes = None if lanes in (0, 63, 255) else lanes
        rate, own = (_gt_per_s(texts[key]) for key in ("pcie_speed", "pcie_speed_max"))
        wanted = min(speed, own or speed)
        share = min((lanes or width) / width, 1.0) * min((rate or wanted) / wanted, 1.0)
        measured = f"x{texts['pcie_width']} at {texts['pcie_speed'] or '?'} (of x{width}, {wanted:g} GT/s)"
        is_known = lanes is not None and (rate is not None or texts["pcie_speed"] is None)
        return cls(width=lanes, speed=rate, share=share, measured=measured, is_known=is_known)


def _gt_per_s(text: str | None) -> float | None:
    """GT/s of `32.0 GT/s PCIe`; None for `Unknown`."""
    match = re.match(r"(\d{1,3}(?:\.\d+)?) GT/s", text or "", re.ASCII)
    return float(match[1]) if match else None


def _judge_firmware(found: Sequence[Port], node: str) -> CheckResult:
    check = Check(id="hca.firmware", node=node, expected="one version on all rails", source="agreement of rails")
    versions = sorted({p.get("firmware") or "not reported" for p in found})
    fix = f"on {node}: mlxfwmanager; bring all rails to one firmware"
    if not found or versions == ["not reported"]:
        return check.judged("SKIP", "no rail reports its firmware")
    return check.judged("PASS" if len(versions) == 1 else "WARN", ", ".join(versions), fix=fix)


def _judge_peermem(fact: dict[str, Any], node: str) -> CheckResult:
    """Without it, and without DMA-BUF in its place, NCCL copies every message through host memory."""
    check = Check(
        id="hca.peermem", node=node, expected="module nvidia_peermem", source="NCCL user guide, GPUDirect RDMA"
    )
    if fact["module"] is None and fact.get("dma_buf"):
        measured = "nvidia_peermem is not loaded; the open driver and this kernel can do without (DMA-BUF)"
        return check.judged("WARN", measured, fix="see `transport`: NCCL's own log must show GDRDMA")
    if fact["module"] is None:
        return check.judged("FAIL", "nvidia_peermem is not loaded", fix=f"on {node}, as root: modprobe nvidia_peermem")
    return check.judged("PASS", f"{fact['module']} {fact['version'] or '(no version)'}")
