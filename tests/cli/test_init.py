"""`janus-cluster init` with stand-ins for Slurm's programs, without Slurm, and on the sandbox's real one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from janus_cluster.desk.site_files import SiteFiles, build_site_files, write_site_files
from janus_cluster.desk.site_survey import SiteFacts
from janus_cluster.errors import UsageError
from janus_cluster.job.load import load_job
from janus_cluster.job.profiles import load_preflight_profile
from janus_cluster.job.resolve import resolve_job
from janus_cluster.job.resources import jobs_dir
from janus_cluster.sandbox import SandboxInfo
from janus_cluster.slurm.survey import (
    Association,
    GpuGres,
    Partition,
    parse_associations,
    parse_gpu_gres,
    parse_partitions,
)

pytestmark = pytest.mark.slow

S = "\x1f"
SINFO = "\n".join(
    S.join(cells)
    for cells in (
        ("cpu*", "up", "infinite", "40", "(null)", "idle"),
        ("gpu", "up", "2-00:00:00", "10", "gpu:nvidia_h800:8(S:0-1)", "mixed"),
        ("gpu", "up", "2-00:00:00", "2", "gpu:nvidia_h800:8(S:0-1)", "drained"),
        ("short", "up", "8:00:00", "3", "gpu:nvidia_h800:8(S:0-1)", "idle"),
        ("old", "down", "infinite", "99", "gpu:v100:8", "idle"),
    )
)
CONFIG = (
    "Configuration data as of 2026-11-29T20:00:00\nClusterName             = hpc\nSLURM_VERSION           = 24.05.1\n"
)


def put(folder: Path, name: str, body: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(f"#!{sys.executable}\nimport sys\n{body}\n")
    (folder / name).chmod(0o755)


@pytest.fixture
def bin_dir(tmp_path: Path) -> Path:
    """Slurm's programs of a site: those of the fields that init asks for."""
    folder = tmp_path / "bin"
    put(folder, "sinfo", f"print({SINFO!r})")
    put(folder, "scontrol", f"print({CONFIG!r})")
    shows = "print('nav|\\nvision|gpu' if 'associations' in sys.argv else 'nav')"
    put(folder, "sacctmgr", f"assert any(a.startswith('user') for a in sys.argv)\n{shows}")
    return folder


def init(tmp_path: Path, *argv: str, path: str | None = None, **environ: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"JANUS_HOME": str(tmp_path / "home"), "PATH": path or str(tmp_path / "bin")} | environ
    return subprocess.run(
        [sys.executable, "-m", "janus_cluster.cli", "init", *argv],
        cwd=tmp_path, env=env, capture_output=True, text=True, check=False, timeout=300, stdin=subprocess.DEVNULL,
    )  # fmt: skip


def test_what_slurm_shows_becomes_defaults_of_every_job(tmp_path: Path, bin_dir: Path) -> None:
    done = init(tmp_path, "--yes", "--partition", "short")
    assert done.returncode == 0, done.stderr
    assert "short: 3 nodes with gpu:nvidia_h800:8, limit 8:00:00; also gpu (--partition)" in done.stdout
    assert "24.05.1, cluster hpc" in done.stdout
    assert "add --probe" in done.stdout
    site = tmp_path / "home/site"
    loaded = load_job(jobs_dir() / "train_2node.yaml", environ={"MODEL_PATH": "/m", "VGGT_MODEL_PATH": "/v",
                                                               "DATA_ROOT": "/d"}, site=site)  # fmt: skip
    slurm = {"partition": "short", "account": "nav", "time": "8:00:00", "gres": "gpu:nvidia_h800:8"}
    assert loaded.config.slurm == slurm | {"comment": "JanusVLN training"}
    assert loaded.config.hardware.gpu_type == "h800"
    assert str(site / "site.yaml") in loaded.origins["slurm.account"]


def test_of_several_partitions_that_with_most_gpu_nodes_is_taken_and_the_limit_only_where_it_is_short(
    tmp_path: Path, bin_dir: Path
) -> None:
    done = init(tmp_path, "--json")
    shown = json.loads(done.stdout)
    (text,) = shown["files"].values()
    assert "partition: gpu" in text and "time" not in text
    assert shown["done"] == []
    assert not (tmp_path / "home").exists(), "nothing is written without --yes where there is no terminal"


def test_a_file_that_is_there_is_replaced_only_with_force_and_kept(tmp_path: Path, bin_dir: Path) -> None:
    assert init(tmp_path, "--yes").returncode == 0
    again = init(tmp_path, "--yes")
    assert (again.returncode, "unchanged" in again.stdout) == (0, True)
    path = tmp_path / "home/site/site.yaml"
    path.write_text("slurm: {partition: mine}\n")
    refused = init(tmp_path, "--yes")
    assert refused.returncode == 2
    assert "there already" in refused.stderr and "--force" in refused.stderr
    assert path.read_text() == "slurm: {partition: mine}\n"
    forced = init(tmp_path, "--force")
    assert forced.returncode == 0 and "site.yaml.old" in forced.stdout
    assert (path.parent / "site.yaml.old").read_text() == "slurm: {partition: mine}\n"
    assert "partition: gpu" in path.read_text()


def test_without_slurm_it_reports_so_and_still_looks_at_the_disk(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    done = init(tmp_path, "--yes")
    assert done.returncode == 0, done.stderr
    assert "no sinfo on PATH" in done.stdout
    assert "$JANUS_HOME/runs" in done.stdout
    assert "nothing to write" in done.stdout


def test_what_fails_is_listed_with_its_reason_and_the_rest_is_found(tmp_path: Path, bin_dir: Path) -> None:
    put(bin_dir, "sacctmgr", "sys.exit('sacctmgr: error: accounting is disabled')")
    put(bin_dir, "srun", "sys.exit('srun: error: Unable to allocate resources: Requested nodes are busy')")
    done = init(tmp_path, "--probe", "--yes")
    assert done.returncode == 0, done.stderr
    assert "account: sacctmgr failed: sacctmgr: error: accounting is disabled" in done.stdout
    assert "node: not probed: srun failed: srun: error: Unable to allocate resources" in done.stdout
    assert "account" not in (tmp_path / "home/site/site.yaml").read_text()


def test_an_unknown_partition_is_refused_with_those_that_there_are(tmp_path: Path, bin_dir: Path) -> None:
    done = init(tmp_path, "--partition", "gpus")
    assert (done.returncode, done.stdout) == (2, "")
    assert "one of: cpu, gpu, short, old" in done.stderr


def node(name: str, ports: list[tuple[str, int]], **gpu: Any) -> dict[str, Any]:
    """Facts as preflight.survey prints them: eight GPUs of that name, and ports of (link layer, rate)."""
    rows = [{"index": str(i), "name": name} for i in range(8)]
    up = {
        "port": "1",
        "state": "4: ACTIVE",
        "phys_state": "5: LinkUp",
        "ca_type": "MT4129",
        "pcie_speed": "16.0 GT/s PCIe",
    }
    listed = [
        up | {"device": f"mlx5_{i}", "link_layer": layer, "rate": f"{rate} Gb/sec (4X)"}
        for i, (layer, rate) in enumerate(ports)
    ]
    table = {"rows": rows, "error": None, "problem": None, "damaged": []} | gpu
    return {"hostname": "n1", "gpu": {"identity": table}, "hca": {"ports": listed}, "route": {"interface": "bond0"}}


def files_of(tmp_path: Path, shown: dict[str, Any], gres: str | None = "h800") -> tuple[SiteFacts, SiteFiles, Path]:
    partition = Partition(name="gpu", is_default=True, is_up=True, time_limit="infinite")
    partition.nodes[GpuGres(type=gres, num=8)] = 4
    facts = SiteFacts(partition=partition, node=shown)
    site = tmp_path / "home/site"
    files = build_site_files(facts, site, now=0)
    write_site_files(files, force=False)
    return facts, files, site


def resolve(site: Path) -> Any:
    environ = {"JANUS_HOME": str(site.parent)}
    loaded = load_job(jobs_dir() / "preflight.yaml", environ=environ, site=site)
    return resolve_job(
        loaded, run_dir=site.parent / "r", cluster="slurm", environ=environ, cwd=site.parent, python="/python"
    )


@pytest.mark.parametrize(
    ("shown", "gres", "profile", "spelled"),
    [
        (("NVIDIA H800", [("InfiniBand", 400)] * 8), "h800", "h800-ib", "gpu:h800:8"),
        (("NVIDIA H20", [("InfiniBand", 400)] * 8), "nvidia_h20", "h20-ib", "gpu:nvidia_h20:8"),
        (("NVIDIA A800-SXM4-80GB", [("InfiniBand", 200)] * 8), None, "a800-ib", "gpu:8"),
        (("NVIDIA H800", []), "h800", "h800-ethernet", "gpu:h800:8"),
    ],
)
def test_a_probed_node_of_a_shipped_kind_gives_its_profile(
    tmp_path: Path, shown: tuple[str, list[tuple[str, int]]], gres: str | None, profile: str, spelled: str
) -> None:
    facts, files, site = files_of(tmp_path, node(*shown), gres)
    resolved = resolve(site)
    assert (resolved.preflight_profile, resolved.sbatch_options["gres"]) == (profile, spelled)
    assert resolved.preflight_thresholds["gpu"]["name"] == shown[0]
    assert list(files.texts) == [site / "site.yaml"]
    assert ("interface", "bond0 (each job finds it again, on each node)") in facts.found


def test_a_node_of_no_shipped_kind_gives_a_profile_of_the_sites_own(tmp_path: Path) -> None:
    _, files, site = files_of(tmp_path, node("NVIDIA H200", [("Ethernet", 200)] * 8), "h200")
    assert set(files.texts) == {site / "site.yaml", site / "preflight/site.yaml", site / "env/site.yaml"}
    resolved = resolve(site)
    own = resolved.preflight_thresholds
    assert (own["gpu"]["name"], own["hca"]["link_layer"], own["hca"]["rate_gb_per_s_min"]) == (
        "NVIDIA H200",
        "Ethernet",
        200,
    )
    assert own["rails"] == load_preflight_profile("h800-roce")["rails"]
    assert {v.name: v.value for v in resolved.env}["NCCL_NET"] == "IB"
    assert "h200" in resolved.sbatch_options["gres"]


def test_gpus_without_figures_give_the_profile_that_a_calibration_completes(tmp_path: Path) -> None:
    facts, files, site = files_of(tmp_path, node("NVIDIA B200", [("InfiniBand", 400)] * 8), "b200")
    assert files.next_command == "janus-cluster preflight --nodes 2 --calibrate"
    assert resolve(site).preflight_profile == "any"
    assert any("b200" in text for _, text in facts.unknown)


def test_a_broken_node_gives_no_profile(tmp_path: Path) -> None:
    shown = node("NVIDIA H800", [("InfiniBand", 400)] * 8)
    shown["hca"]["ports"][3]["state"] = "1: DOWN"
    facts, _, site = files_of(tmp_path, shown)
    assert ("network", "rails that are down, or differ: mend the node, or probe another one") in facts.unknown
    assert "profile" not in (site / "site.yaml").read_text()
    hung = node("NVIDIA H800", [], rows=[], error="nvidia-smi did not answer within 60 s")
    facts, _, _ = files_of(tmp_path / "other", hung)
    assert ("GPUs", "n1: nvidia-smi did not answer within 60 s") in facts.unknown


def test_nothing_is_written_where_one_of_the_files_is_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "home/site/env").mkdir(parents=True)
    (tmp_path / "home/site/env/site.yaml").write_text("like: cpu\n")
    with pytest.raises(UsageError, match="env/site"):
        files_of(tmp_path, node("NVIDIA H200", [("Ethernet", 200)] * 8))
    assert not (tmp_path / "home/site/site.yaml").exists()


def test_gres_partitions_and_accounts_are_parsed() -> None:
    assert parse_gpu_gres("nvme:1,gpu:h800:8(S:0-1)") == GpuGres(type="h800", num=8)
    assert parse_gpu_gres("gpu:4") == GpuGres(type=None, num=4)
    assert parse_gpu_gres("(null)") is parse_gpu_gres("craynetwork:4") is None
    partitions = {p.name: p for p in parse_partitions(SINFO)}
    assert (partitions["gpu"].num_gpu_nodes, partitions["cpu"].is_default, partitions["old"].is_up) == (10, True, False)
    assert parse_partitions("a line of another shape\n") == []
    assert parse_associations("nav|\nvision|gpu\n", default="nav") == [
        Association(account="nav", partition="", is_default=True),
        Association(account="vision", partition="gpu", is_default=False),
    ]


@pytest.mark.slurm
def test_on_a_real_slurm_one_node_is_probed(tmp_path: Path, sandbox: SandboxInfo) -> None:
    done = init(tmp_path, "--probe", "--yes", **{"PATH": os.environ["PATH"]} | sandbox.env())
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nodes with gpu:h800:8" in done.stdout
    assert "node         h800-0" in done.stdout, done.stdout
    text = (tmp_path / "home/site/site.yaml").read_text()
    assert "partition:" in text and "gpu_type: h800" in text
