from __future__ import annotations

import ipaddress
import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from janus_cluster.cli.sandbox import sandbox as sandbox_command
from janus_cluster.errors import SandboxFailed, UsageError
from janus_cluster.sandbox import SandboxInfo, down, fault, heal, load_info, status
from janus_cluster.sandbox.network import NetworkPlan
from janus_cluster.sandbox.state import Daemon, Fault, write_info

PLAN = NetworkPlan("a1b2c3", ipaddress.IPv4Network("198.18.7.0/24"), 2)


@pytest.fixture
def info(tmp_path: Path) -> SandboxInfo:
    """A sandbox of a boot that is long past."""
    return SandboxInfo(
        home=str(tmp_path),
        mode="namespaces",
        slurm_conf=str(tmp_path / "etc" / "slurm.conf"),
        boot_id="of another boot",
        accounting=False,
        controller_port=6817,
        nodes=PLAN.nodes([str(tmp_path / "m1"), str(tmp_path / "m2")]),
        complete=True,
        network=PLAN.network(),
        # Pid 1 is alive, but is not ours: only its start time shows it.
        daemons=(Daemon("slurmctld", 1, 1),),
        faults=(Fault("cut-link", "h800-01", {"rail": "ib3"}),),
    )


def test_what_is_written_is_what_is_loaded(info: SandboxInfo) -> None:
    write_info(info)
    assert load_info(Path(info.home)) == info


def test_env_is_all_that_slurm_commands_need(info: SandboxInfo) -> None:
    assert info.env() == {"SLURM_CONF": f"{info.home}/etc/slurm.conf"}


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema_version": 99}', '{"schema_version": 1, "home": "/x"}', "{"])
def test_a_state_file_of_another_shape_counts_as_none(text: str, tmp_path: Path) -> None:
    (tmp_path / "sandbox.json").write_text(text)
    assert load_info(tmp_path) is None


def test_a_sandbox_of_another_boot_is_stale_and_taken_away(info: SandboxInfo) -> None:
    home = Path(info.home)
    write_info(info)
    assert status(home).state == "stale"
    assert down(home)
    assert (status(home).state, down(home)) == ("down", False)


def test_down_brings_back_what_a_fault_had_moved_aside(info: SandboxInfo) -> None:
    home = Path(info.home)
    kept = home / "kept"
    kept.write_text("mine")
    hidden = Fault("hide-path", "h800-02", {"path": "/mnt/node/data/f", "kept": str(kept)})
    write_info(replace(info, faults=(hidden,)))
    down(home)
    assert (home / "m2" / "data" / "f").read_text() == "mine"


def test_a_daemon_started_again_replaces_the_old_one(info: SandboxInfo) -> None:
    again = info.with_daemon(Daemon("slurmctld", 5, 6))
    assert again.daemons == (Daemon("slurmctld", 5, 6),)
    assert again.daemon("slurmd-h800-01") is None


def test_paths_below_the_nodes_mount_are_found_on_this_machine(info: SandboxInfo) -> None:
    assert info.host_path("h800-02", "/mnt/node/data/x") == Path(info.home) / "m2" / "data" / "x"
    assert info.host_path("h800-02", "/mnt/nodes/x") is None
    assert info.host_path("h800-09", "/mnt/node/x") is None


def test_faults_and_heal_without_a_sandbox_show_how_to_start_one(tmp_path: Path) -> None:
    for call in (lambda: fault(tmp_path, "cut-link", "h800-01"), lambda: heal(tmp_path)):
        with pytest.raises(SandboxFailed, match="no sandbox runs") as caught:
            call()
        assert caught.value.hint == "janus-cluster sandbox up"


@pytest.mark.parametrize(
    ("kind", "node", "rail", "expected_text"),
    [
        ("cut", "h800-01", "all", "cut-link"),
        ("cut-link", "h800-01", "8", "ib7"),
    ],
)
def test_an_unknown_fault_or_rail_lists_the_known_ones(
    kind: str, node: str, rail: str, expected_text: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=expected_text):
        fault(tmp_path, kind, node, rail=rail)


def test_status_json_of_nothing_is_down_and_exits_1(tmp_path: Path) -> None:
    done = CliRunner().invoke(sandbox_command, ["status", "--json"], env={"JANUS_HOME": str(tmp_path)})
    value = json.loads(done.stdout)
    assert (done.exit_code, value["state"], value["home"]) == (1, "down", str(tmp_path / "sandbox"))
    assert set(value) == {
        "schema_version",
        "state",
        "home",
        "mode",
        "slurm_conf",
        "slurm_version",
        "slurm_root",
        "accounting",
        "nodes",
        "daemons",
        "faults",
    }
