"""No damage to what a program prints crashes its parser, or turns a node that is not sound into a pass.

The judge of a family may give PASS for damaged text only where a second, much simpler reading finds every fact that a
sound node shows. The faults are seeded; the damage is drawn.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from node_fixtures import KERNEL_PHYS, KERNEL_STATES, gpu_rows, smi_texts, sound_ports, uuid

from janus_cluster.job.profiles import load_preflight_profile
from janus_cluster.preflight.command import CommandOutput
from janus_cluster.preflight.gpu import judge_gpus
from janus_cluster.preflight.gpu_health import judge_gpu_health
from janus_cluster.preflight.gpu_load import judge_gpu_load
from janus_cluster.preflight.gpu_processes import judge_processes
from janus_cluster.preflight.gpu_query import FAMILIES, HEALTH, LOAD, REMAPPED, parse_processes, parse_table
from janus_cluster.preflight.hca import port_name
from janus_cluster.preflight.hca_judge import judge_hcas
from janus_cluster.preflight.ibstat import parse_ibstat
from janus_cluster.preflight.nvlink import judge_nvlink
from janus_cluster.run.records.verdict import worst
from tests.drawing import RANDOM, drawn

pytestmark = pytest.mark.slow

H800 = load_preflight_profile("h800-ib")
ROUNDS = 150
GARBAGE = [
    "",
    "\0",
    "[Unknown Error]",
    "[N/A]",
    "Zustand: Aktiv",
    "\ufffd\ufffd",
    "ibpanic: x",
    ",,,,",
    "CA ''",
    "9" * 400,
    "²",
]


def damage(text: str, rng: random.Random) -> str:
    """One of: cut, lines lost, lines swapped, a line doubled, a line replaced, characters replaced."""
    lines = text.splitlines(keepends=True)
    if not lines:
        return rng.choice(GARBAGE)
    i = rng.randrange(len(lines))
    kind = rng.randrange(7)
    if kind == 0:
        return text[: rng.randrange(len(text) + 1)]
    if kind == 1:
        j = min(len(lines), i + rng.randrange(1, 4))
        return "".join(lines[:i] + lines[j:])
    if kind == 2:
        j = rng.randrange(len(lines))
        lines[i], lines[j] = lines[j], lines[i]
    elif kind == 3:
        lines.insert(rng.randrange(len(lines) + 1), lines[i])
    elif kind == 4:
        lines[i] = rng.choice(GARBAGE) + "\n"
    elif kind == 5:
        rng.shuffle(lines)
    else:
        at = rng.randrange(len(text))
        return text[:at] + rng.choice(["x", "\t", " ", "0", "\n", "é", ","]) + text[at + rng.randrange(3) :]
    return "".join(lines)


def lost_lines(num_lines: int) -> st.SearchStrategy[dict[int, str]]:
    """Numbers of lines, each with its replacement."""
    return st.dictionaries(
        st.integers(0, num_lines - 1), st.sampled_from(["", *(f"{text}\n" for text in GARBAGE)]), max_size=20
    )


def tables(family: str, text: str) -> dict[str, Any]:
    """A sound node's answers, but for one family's text."""
    found = {}
    for name, sound in smi_texts().items():
        damaged = text if name == family else sound
        if name == "nvlink":
            found[name] = {"text": damaged, "problem": None, "error": None}
        elif name == "processes":
            found[name] = parse_processes(output(damaged))
        else:
            fields = {"remapped": REMAPPED, "load": LOAD[0], "health": HEALTH[0]}.get(name) or FAMILIES[name][0]
            found[name] = {**parse_table(damaged, fields), "problem": None, "error": None}
    return found


def output(text: str) -> CommandOutput:
    return CommandOutput(program="nvidia-smi", rc=0, stdout=text, stderr="", error=None, duration_s=0.1)


def judge_smi(family: str, text: str) -> str:
    damaged = tables(family, text)
    results = [
        *judge_gpus(damaged, H800["gpu"], node="n", gpus_per_node=8),
        *judge_gpu_health(damaged, H800["gpu"], node="n", gpus_per_node=8),
        *judge_nvlink(damaged, H800["gpu"], node="n", gpus_per_node=8),
        *judge_processes(damaged, H800["gpu"], node="n"),
        *judge_gpu_load([damaged["load"]], H800["gpu"], node="n", gpus_per_node=8),
    ]
    return worst([r.state for r in results])


def judge_ibstat(text: str) -> str:
    ports = [
        {
            "device": p.device, "port": "1", "state": KERNEL_STATES[p.state], "phys_state": KERNEL_PHYS[p.phys],
            "rate": f"{p.rate} Gb/sec (4X NDR)", "link_layer": p.layer, "ca_type": p.ca_type, "pcie_width": "16",
        }
        for p in sound_ports()
    ]  # fmt: skip
    facts = {
        "hca": {"ports": ports, "folder": "/sys"},
        "ibstat": {"text": text, "stderr": "", "problem": None, "error": None},
        "verbs": {
            "text": "".join(f"  {p['device']}  {1:016x}\n" for p in ports),
            "problem": None,
            "error": None,
            "opened": {"text": "".join(f"hca_id:\t{p['device']}\n" for p in ports), "problem": None, "error": None},
        },
        "peermem": {"module": "nvidia_peermem", "version": "1"},
    }
    results = judge_hcas(facts, H800["hca"], node="n")
    return worst([r.state for r in results if r.id in ("hca.ibstat", "hca.agree")])


def sees_eight(pattern: Callable[[int], str], text: str) -> bool:
    """Each of eight GPUs or rails has its sound line somewhere. Blanks before a comma are no part of a cell."""
    text = re.sub(r"[ \t]+,", ",", text)
    return all(re.search(pattern(i), text, re.MULTILINE) for i in range(8))


SMI_FACTS: dict[str, Callable[[int], str]] = {
    "identity": lambda i: rf"^\s*{i}\s*,.*NVIDIA H800, *[89]\d{{4,}}",
    "ecc": lambda i: rf"^\s*{i}\s*,\s*0+[ .]?.*,\s*0+.*,",
    "throttle": lambda i: rf"^\s*{i}\s*,\s*0x0*[0145]\s*$",
    "pcie": lambda i: rf"^\s*{i}\s*,\s*0*(1[6-9]|[2-9]\d|\d{{3,}}).*,\s*0*([5-9]|\d\d)",
    "load": lambda i: rf"^\s*{i}\s*,[^,]*,\s*\d.*,\s*\d.*,\s*0*(1[6-9]|[2-9]\d|\d{{3,}})",
    "persistence": lambda i: rf"^\s*{i}\s*,\s*Enabled\s*$",
    "fabric": lambda i: rf"^\s*{i}\s*,\s*Completed,\s*Success\s*$",
    "remapped": lambda i: r"^\s*\S*\w{6,}\S*,\s*0",
    "mig": lambda i: rf"^\s*{i}\s*,\s*Disabled,\s*Disabled\s*$",
    "recovery": lambda i: rf"^\s*{i}\s*,\s*None\s*$",
    "power": lambda i: rf"^\s*{i}\s*,\s*0*[7-9]\d\d",
    "nvlink": lambda i: rf"^\s*GPU {i}:",
}
SMI_FAULTS = {
    "identity": (gpu_rows()[5], gpu_rows(name="NVIDIA H800 PCIe")[5]),
    "ecc": ("5, 0, 0", "5, 3, 3"),
    "throttle": ("5, 0x0000000000000001", "5, 0x0000000000000040"),
    "pcie": ("5, 16, 5", "5, 16, 4"),
    "load": ("5, P0, 5, 5, 16", "5, P0, 3, 5, 16"),
    "persistence": ("5, Enabled", "5, Disabled"),
    "fabric": ("5, Completed", "5, In Progress"),
    "mig": ("5, Disabled", "5, Enabled"),
    "recovery": ("5, None", "5, Reset"),
    "power": ("5, 700.00", "5, 400.00"),
    "remapped": (f"{uuid(5)}, 0, 0, 0, 0", f"{uuid(5)}, 0, 0, 1, 1"),
    "nvlink": (
        f"{uuid(5)})\n\t Link 0: 26.562 GB/s",
        f"{uuid(5)})\n\t Link 0: <inactive>",
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", SMI_FAULTS)
def test_a_pass_of_damaged_nvidia_smi_still_holds_every_wanted_fact(family: str) -> None:
    sound = smi_texts()[family]
    assert judge_smi(family, sound) == "PASS"

    @drawn(ROUNDS)
    @given(rng=RANDOM)
    def judge_damaged(rng: random.Random) -> None:
        text = sound
        for _ in range(rng.randrange(1, 4)):
            text = damage(text, rng)
        if judge_smi(family, text) == "PASS":
            assert sees_eight(SMI_FACTS[family], text), text

    judge_damaged()


@pytest.mark.parametrize("family", SMI_FAULTS)
def test_lost_lines_never_turn_a_faulty_gpu_into_a_pass(family: str) -> None:
    sound, fault = SMI_FAULTS[family]
    faulty = smi_texts()[family].replace(sound, fault)
    assert faulty != smi_texts()[family]
    assert judge_smi(family, faulty) != "PASS"
    lines = faulty.splitlines(keepends=True)

    @drawn(ROUNDS)
    @given(lost=lost_lines(len(lines)), order=st.permutations(range(len(lines))), is_shuffled=st.booleans())
    def judge_without_lines(lost: dict[int, str], order: list[int], is_shuffled: bool) -> None:
        shown = order if is_shuffled and family != "nvlink" else range(len(lines))
        kept = "".join(lost.get(i, lines[i]) for i in shown)
        assert judge_smi(family, kept) != "PASS", kept

    judge_without_lines()


@drawn(2 * ROUNDS)
@given(rng=RANDOM)
def test_a_pass_of_damaged_ibstat_still_holds_every_wanted_fact(rng: random.Random) -> None:
    text = "".join(p.ibstat() for p in sound_ports())
    assert judge_ibstat(text) == "PASS"
    for _ in range(rng.randrange(1, 4)):
        text = damage(text, rng)
    if judge_ibstat(text) == "PASS":
        assert sees_eight(lambda i: rf"^\s*CA 'mlx5_{i}'", text)
        # The ninth is not of the rails.
        assert len(re.findall(r"State: Active", text)) >= 8
        assert len(re.findall(r"Rate: 400", text)) >= 8


@pytest.mark.parametrize("fault", ["Rate: 200", "State: Down", "Physical state: Polling", "Link layer: Ethernet"])
def test_lost_lines_never_turn_a_faulty_rail_into_a_pass(fault: str) -> None:
    blocks = [p.ibstat() for p in sound_ports()]
    key = fault.partition(":")[0]
    blocks[4] = re.sub(rf"(?m)^(\s*){key}: .*$", rf"\g<1>{fault}", blocks[4])
    lines = "".join(blocks).splitlines(keepends=True)
    assert judge_ibstat("".join(lines)) != "PASS"

    @drawn(ROUNDS)
    @given(lost=lost_lines(len(lines)))
    def judge_without_lines(lost: dict[int, str]) -> None:
        kept = "".join(lost.get(i, line) for i, line in enumerate(lines))
        assert judge_ibstat(kept) != "PASS", kept

    judge_without_lines()


@drawn(ROUNDS)
@given(text=st.text("CAPort:'\n\t ,0123456789GPULinkxXid()[]State²é\0", max_size=300))
def test_garbage_of_any_kind_crashes_nothing(text: str) -> None:
    parse_ibstat(text)
    assert judge_ibstat(text) != "PASS"
    for family in SMI_FAULTS:
        assert judge_smi(family, text) != "PASS"


def test_port_names_are_nccls() -> None:
    assert port_name({"device": "mlx5_0", "port": "1"}) == "mlx5_0:1"
