"""Every shipped profile against a sound node of its kind, and against sound nodes of every other kind."""

from __future__ import annotations

import shlex
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from node_fixtures import NUM, OF_THIS_MACHINE, FakeNode, FakePort, gpu_rows, h800_node, smi_texts

from janus_cluster.job.gpu_part import GpuPart
from janus_cluster.job.profiles import load_part, load_preflight_profile, profile_names
from janus_cluster.job.resolved import ResolvedJob
from janus_cluster.preflight.bandwidth import judge_gemm, judge_intra_node
from janus_cluster.preflight.gate import build_verdict
from janus_cluster.preflight.static import judge_static
from janus_cluster.run.records.verdict import CheckResult, Verdict

pytestmark = pytest.mark.slow

KINDS = [name for name in profile_names("preflight") if load_preflight_profile(name)["gpu"].get("name")]
# What nvidia-smi prints for memory.total, MiB: captured or published.
MEMORY_MIB = {"h800": 81559, "h100": 81559, "h200": 143771, "h20": 97871, "a800": 81920}


def smi_of(part: GpuPart, memory_mib: int) -> dict[str, str]:
    """What nvidia-smi prints on a sound node with these GPUs."""
    h800, sound = load_part("h800"), smi_texts()
    table = sound["identity"].splitlines()[:1] + gpu_rows(name=part.name, memory=str(memory_mib))
    links = "".join(f"\t Link {k}: 26.562 GB/s\n" for k in range(part.nvlink_links))
    blocks = [f"{head}{links}" for head in _heads(sound["nvlink"], h800.name, part.name)]
    watts = "".join(f"{i}, {part.power_limit_w:.2f}, {part.power_limit_w:.2f}\n" for i in range(NUM))
    generation = f"16, {part.pcie_generation}, {part.pcie_generation}"
    return sound | {
        "identity": "\n".join([*table, ""]),
        "nvlink": "".join(blocks),
        "power": f"{sound['power'].splitlines()[0]}\n{watts}",
        "pcie": sound["pcie"].replace("16, 5, 5", generation),
    }


def _heads(text: str, before: str, after: str) -> list[str]:
    return [f"{line.replace(before, after)}\n" for line in text.splitlines() if line.startswith("GPU")]


def ports_of(profile: dict[str, Any]) -> list[FakePort]:
    """Sound rails as the profile expects them; an Ethernet site has an ordinary card that is no RDMA device."""
    hca = profile["hca"]
    if not hca["wanted"]:
        return []
    speed = f"{hca['pcie_gt_per_s_min']:.1f} GT/s PCIe"
    name = "mlx5_bond_" if hca["link_layer"] == "Ethernet" else "mlx5_"
    return [
        FakePort(
            f"{name}{i}", rate=hca["rate_gb_per_s_min"], layer=hca["link_layer"], speed=speed, speed_max=speed
        )
        for i in range(hca["ports_min"])
    ]  # fmt: skip


def sound_node(folder: Path, kind: str, **changes: Any) -> FakeNode:
    profile = load_preflight_profile(kind)
    smi = smi_of(load_part(profile["part"]), MEMORY_MIB[profile["part"]])
    return h800_node(folder, smi=smi, ports=ports_of(profile), **changes)


def options_of(kind: str) -> tuple[str, ...]:
    return (f"environment.profile={kind}", f"hardware.gpu_type={load_preflight_profile(kind)['part']}")


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Facts of a sound node of a kind, as the real facts phase reads them for a job of that kind or of another."""

    @cache
    def of(kind: str, *, reads_rails: bool) -> tuple[FakeNode, dict[str, Any]]:
        node = sound_node(tmp_path_factory.mktemp(kind), kind).write()
        node.sets += options_of("h800-ib" if reads_rails else "h800-ethernet")
        return node, node.facts(node.resolve())

    return of


def resolve_for(node: FakeNode, *sets: str) -> ResolvedJob:
    before, node.sets = node.sets, (*node.sets, *sets)
    try:
        return node.resolve()
    finally:
        node.sets = before


def verdict_of(facts: Any, kind: str, *sets: str, job: str) -> Verdict:
    """A job of the kind `job`, with `sets`, that gets a sound node of `kind`."""
    wants_rails = bool(load_preflight_profile(job)["hca"]["wanted"])
    node, read = facts(kind, reads_rails=wants_rails)
    resolved = resolve_for(node, *options_of(job), *sets)
    results = judge_static({node.name: read | {"config_hash": resolved.config_hash}}, resolved)
    kept = [r for r in results if r.id not in OF_THIS_MACHINE and not r.id.startswith("paths")]
    return build_verdict(kept, resolved, nodes=(node.name,), job_id=None, now=0)


def faults(verdict: Verdict) -> dict[str, CheckResult]:
    return {r.id: r for r in verdict.results if r.state not in ("PASS", "SKIP")}


def test_the_shipped_kinds_are_these() -> None:
    assert KINDS == [
        "a800-ib", "h100-ib", "h20-ib", "h200-ib", "h800-ethernet", "h800-hdr", "h800-ib", "h800-ib-4", "h800-roce",
        "h800-roce-400",
    ]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_sound_node_passes_its_own_profile(facts: Any, kind: str) -> None:
    verdict = verdict_of(facts, kind, job=kind)
    assert {check: r.measured for check, r in faults(verdict).items()} == {}
    assert verdict.state == "PASS"


@pytest.mark.parametrize("job", KINDS)
def test_a_sound_node_of_another_kind_is_named_and_not_excluded(facts: Any, job: str) -> None:
    for kind in KINDS:
        if kind == job:
            continue
        verdict = verdict_of(facts, kind, job=job)
        assert verdict.exclude == (), kind
        assert set(faults(verdict)) == {"site.kind"}, kind
        row = faults(verdict)["site.kind"]
        assert f"another kind of site, {kind}" in row.measured
        words = shlex.split(row.fix.partition("; else")[0])
        sets = [words[i + 1] for i, word in enumerate(words) if word == "--set"]
        assert f"environment.profile={kind}" in sets
        adopted = verdict_of(facts, kind, *sets, job=job)
        # The job of an Ethernet site has read no more of the adapters than names the kind.
        assert adopted.state == "PASS" or not load_preflight_profile(job)["hca"]["wanted"], (kind, faults(adopted))


def test_only_what_differs_in_rails_trains(facts: Any) -> None:
    states = {
        kind: faults(verdict_of(facts, kind, job="h800-ib"))["site.kind"].state for kind in KINDS if kind != "h800-ib"
    }
    assert {kind for kind, state in states.items() if state == "WARN"} == {"h800-ib-4", "h800-hdr"}
    for job in ("h800-hdr", "h800-ib-4", "h800-ethernet"):
        assert faults(verdict_of(facts, "h800-ib", job=job))["site.kind"].state == "WARN"


def test_a_fault_of_a_node_of_another_kind_is_found_and_blamed(tmp_path: Path) -> None:
    broken = load_preflight_profile("h200-ib")
    ports = ports_of(broken)
    ports[3] = FakePort("mlx5_3", state="Down", phys="Polling", rate=10)
    node = sound_node(tmp_path, "h200-ib")
    node.ports = ports
    found = node.write().judge()
    assert (found["site.kind"].state, found["site.kind"].blames_node) == ("FAIL", False)
    assert "preflight.thresholds.part=h200" in found["site.kind"].fix
    assert (found["hca.rails"].state, found["hca.rails"].blames_node) == ("FAIL", True)
    assert found["gpu.memory"].state == found["gpu.nvlink"].state == "PASS"


def test_the_part_alone_is_adopted_by_the_line_that_is_printed(tmp_path: Path) -> None:
    node = sound_node(tmp_path, "h200-ib")
    node.ports = [FakePort(f"mlx5_{i}", rate=200) for i in range(NUM)]
    node.write()
    words = shlex.split(node.judge()["site.kind"].fix)
    node.sets += tuple(words[i + 1] for i, word in enumerate(words) if word == "--set")
    found = node.judge()
    assert found["site.kind"].state == "PASS"
    assert "another kind of site" in found["hca.rails"].measured
    assert node.resolve().preflight_thresholds["gpu"]["memory_mib_min"] == 141000
    assert node.resolve().sbatch_options["gres"] == "gpu:h200:8"


def test_beside_a_node_of_the_jobs_kind_the_odd_one_is_blamed(facts: Any) -> None:
    node, read = facts("h800-ib", reads_rails=True)
    _, other = facts("h200-ib", reads_rails=True)
    resolved = resolve_for(node, *options_of("h800-ib"))
    both = {"n1": read, "n2": other}
    results = judge_static({n: f | {"config_hash": resolved.config_hash, "node": n} for n, f in both.items()}, resolved)
    kept = [r for r in results if r.id == "site.kind"]
    assert build_verdict(kept, resolved, nodes=("n1", "n2"), job_id=None, now=0).exclude == ("n2",)


@pytest.mark.parametrize("kind", ["h800-ib", "any"])
def test_gpus_of_no_shipped_part_are_named_and_a_profile_without_figures_judges_them(tmp_path: Path, kind: str) -> None:
    part = load_part("h200").model_copy(update={"name": "NVIDIA B200", "memory_gb": 180, "pcie_generation": 6})
    node = h800_node(tmp_path, smi=smi_of(part, 183359), sets=(f"environment.profile={kind}",)).write()
    found = {check: r for check, r in node.judge().items() if r.state not in ("PASS", "SKIP")}
    found = {check: r for check, r in found.items() if check not in OF_THIS_MACHINE and not check.startswith("paths")}
    if kind == "any":
        assert set(found) == {"site.kind"}
        assert (found["site.kind"].state, "no figures" in found["site.kind"].measured) == ("WARN", True)
    else:
        assert (found["gpu.model"].state, found["gpu.model"].blames_node) == ("FAIL", False)
        assert "--profile any --calibrate" in found["gpu.model"].fix


def test_under_the_profile_without_figures_unequal_gpus_are_found(tmp_path: Path) -> None:
    smi = smi_texts()
    smi["identity"] = smi["identity"].replace("NVIDIA H800, 81559", "NVIDIA H20, 97871", 1)
    smi["nvlink"] = smi["nvlink"].replace("\t Link 7: 26.562 GB/s\n", "", 1)
    found = h800_node(tmp_path, smi=smi, sets=("environment.profile=any",)).write().judge()
    assert (found["gpu.model"].state, found["gpu.model"].blames_node) == ("FAIL", True)
    assert (found["gpu.nvlink"].state, "GPU 0: 7 of 8" in found["gpu.nvlink"].measured) == ("FAIL", True)


def test_the_profile_without_figures_names_a_shipped_kind_that_fits(facts: Any) -> None:
    node, read = facts("h20-ib", reads_rails=True)
    resolved = resolve_for(node, "environment.profile=any", "hardware.gpu_type=h20")
    (row,) = [
        r
        for r in judge_static({node.name: read | {"config_hash": resolved.config_hash}}, resolved)
        if r.id == "site.kind"
    ]
    assert "--set environment.profile=h20-ib" in row.fix


@pytest.mark.parametrize("name", profile_names("gpu"))
def test_what_a_part_reaches_passes_its_floors_and_what_half_of_it_reaches_does_not(name: str) -> None:
    part = load_part(name)
    kind = next(k for k in KINDS if load_preflight_profile(k)["part"] == name)
    profile = load_preflight_profile(kind)

    def judge(share: float) -> tuple[str, str]:
        tflops, bus = 0.7 * share * part.peak_tflops, 0.8 * share * part.nvlink_gb_per_s / 2
        gemm = [{"rank": i, "local_rank": i, "tflops": tflops, "consistent": True} for i in range(8)]
        times_s = [1e9 * 1.75 / (bus * 1e9)]
        node = {"times_s": times_s, "payload_bytes": 10**9, "num_ranks": 8, "sum_correct": True}
        found = {"gemm": gemm, "intra_node": node}
        return judge_gemm(found, profile, node="n1").state, judge_intra_node(found, profile, node="n1").state

    assert judge(1) == ("PASS", "PASS")
    assert judge(0.5) == ("FAIL", "FAIL")


def test_every_part_has_the_keys_of_the_gate_and_a_source_for_each_figure() -> None:
    from janus_cluster.job.resources import templates_dir

    for path in (templates_dir() / "gpu").glob("*.yaml"):
        for line in path.read_text().splitlines():
            figure = line.partition(":")[2].partition("#")
            is_number = figure[0].strip().replace(".", "").isdigit()
            known = line.startswith(("memory_gb", "pcie_width"))
            assert not is_number or figure[2] or known, f"{path.name}: {line}: without a source"
