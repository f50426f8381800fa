"""Which Slurm a sandbox takes, and the settings that its version needs; without starting one."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from janus_cluster.errors import SandboxFailed
from janus_cluster.sandbox import SandboxInfo
from janus_cluster.sandbox.layout import Layout
from janus_cluster.sandbox.ports import is_loopback
from janus_cluster.sandbox.programs import slurm_programs
from janus_cluster.sandbox.render import render_cgroup_conf, render_slurm_conf
from janus_cluster.sandbox.state import Node
from janus_cluster.sandbox.versions import SlurmBuild, find_root, find_slurm, parse_release, parse_version
from janus_cluster.slurm.client_env import client_env, write_client_env

LAYOUT = Layout(Path("/srv/box"))
INFO = SandboxInfo(
    home="/srv/box",
    mode="plain",
    slurm_conf="/srv/box/etc/slurm.conf",
    boot_id="boot",
    accounting=False,
    controller_port=17000,
    nodes=(Node("h800-01", "127.0.0.1", 17001, "/m1"), Node("h800-02", "127.0.0.1", 17002, "/m2")),
    slurm_version="22.05.8",
)


def slurm_conf(info: SandboxInfo, *, loopback_only: bool = False) -> dict[str, str]:
    """Key → value of each line of the rendered slurm.conf."""
    text = render_slurm_conf(LAYOUT, info, user="u", controller_host="c", real_memory_mb=9, loopback_only=loopback_only)
    return dict(line.split("=", 1) for line in text.splitlines() if line and not line.startswith("#"))


def write_build(root: Path, prints: str, *, without: str = "") -> Path:
    """A prefix whose slurmctld prints that version, and that has a munged."""
    (root / "sbin").mkdir(parents=True)
    for name in {*slurm_programs(accounting=True), "munged"} - {without}:
        (root / "sbin" / name).write_text(f"#!/bin/sh\necho '{prints}'\n")
        (root / "sbin" / name).chmod(0o755)
    return root


@pytest.mark.parametrize(
    ("version", "plugin"),
    [
        *(("22.05.8", "cgroup/v1"), ("23.11.11", "cgroup/v1"), ("24.05.0", "disabled")),
        *(("24.11.5", "disabled"), ("25.05.8", "disabled"), ("26.05.5", "disabled")),
    ],
)
def test_each_version_gets_a_cgroup_plugin_that_it_has(version: str, plugin: str) -> None:
    text = render_cgroup_conf(replace(INFO, slurm_version=version))
    assert text.splitlines()[-1] == f"CgroupPlugin={plugin}"


@pytest.mark.parametrize("version", ["24.05.0", "24.11.5", "26.05.5"])
def test_from_24_05_the_unkillable_timeout_is_five_message_timeouts(version: str) -> None:
    conf = slurm_conf(replace(INFO, slurm_version=version))
    assert int(conf["UnkillableStepTimeout"]) >= 5 * int(conf["MessageTimeout"])


@pytest.mark.parametrize(
    ("printed", "version", "release"),
    [
        ("slurm-wlm 22.05.8\n", "22.05.8", (22, 5)),
        ("slurm 24.11.5", "24.11.5", (24, 11)),
        ("slurm 25.11.0-0rc1\n", "25.11.0", (25, 11)),
        ("slurm 26.05", "26.05", (26, 5)),
    ],
)
def test_a_version_is_read_from_what_slurmctld_prints(printed: str, version: str, release: tuple[int, int]) -> None:
    assert (parse_version(printed), parse_release(version)) == (version, release)


def test_slurm_root_wins_over_path_and_its_version_is_asked(tmp_path: Path) -> None:
    new = write_build(tmp_path / "new", "slurm 24.11.5")
    old = write_build(tmp_path / "old", "slurm 23.11.11")
    environ = {"SLURM_ROOT": str(new), "PATH": f"{old}/sbin:{os.environ['PATH']}"}
    assert find_slurm(environ) == SlurmBuild("24.11.5", str(new))


def test_a_slurm_that_only_path_names_is_its_whole_prefix(tmp_path: Path) -> None:
    build = write_build(tmp_path / "opt" / "slurm", "slurm 24.05.8")
    assert find_slurm({"PATH": f"{build}/sbin:{os.environ['PATH']}"}) == SlurmBuild("24.05.8", str(build))
    (tmp_path / "shim").mkdir()
    (tmp_path / "shim" / "slurmctld").symlink_to(build / "sbin" / "slurmctld")
    # One program in the way of the others is no Slurm of its own.
    assert find_root({"PATH": f"{tmp_path / 'shim'}:/usr/bin"}) is None
    assert find_root({"PATH": "/nowhere"}) is None


@pytest.mark.parametrize("without", ["srun", "slurmd", "slurmdbd"])
def test_a_slurm_root_that_lacks_a_program_is_refused_by_name(without: str, tmp_path: Path) -> None:
    build = write_build(tmp_path / "slurm", "slurm 24.11.5", without=without)
    environ = {"SLURM_ROOT": str(build), "PATH": os.environ["PATH"]}
    with pytest.raises(SandboxFailed, match=rf"SLURM_ROOT={build}: no {without} in its bin/ or sbin/") as caught:
        find_slurm(environ, accounting=True)
    assert "bin/srun, sbin/slurmctld" in str(caught.value.hint)


def test_a_slurm_root_that_a_script_could_misread_is_refused(tmp_path: Path) -> None:
    build = write_build(tmp_path / "a b", "slurm 24.11.5")
    with pytest.raises(SandboxFailed, match="only letters, digits"):
        find_slurm({"SLURM_ROOT": str(build), "PATH": os.environ["PATH"]})


@pytest.mark.parametrize(
    ("prints", "words"), [("slurm 21.08.8", "needs Slurm 22.05 or newer"), ("no idea", "prints no version: 'no idea'")]
)
def test_a_slurm_too_old_or_without_a_version_is_refused(prints: str, words: str, tmp_path: Path) -> None:
    build = write_build(tmp_path / "slurm", prints)
    with pytest.raises(SandboxFailed, match=words):
        find_slurm({"SLURM_ROOT": str(build), "PATH": os.environ["PATH"]})


def test_clients_of_a_sandbox_use_its_own_programs(tmp_path: Path) -> None:
    conf = tmp_path / "etc" / "slurm.conf"
    assert client_env(conf) == {"SLURM_CONF": str(conf)}
    conf.parent.mkdir()
    write_client_env(conf, replace(INFO, slurm_conf=str(conf), slurm_root="/opt/slurm").env())
    env = client_env(conf)
    assert env["SLURM_CONF"] == str(conf)
    assert env["PATH"].split(":")[:2] == ["/opt/slurm/bin", "/opt/slurm/sbin"]
    other = tmp_path / "other" / "slurm.conf"
    assert client_env(other) == {"SLURM_CONF": str(other)}


def test_jobs_find_the_programs_of_a_slurm_root_first() -> None:
    assert "TaskProlog" not in slurm_conf(INFO)
    assert slurm_conf(replace(INFO, slurm_root="/opt/slurm"))["TaskProlog"] == "/srv/box/etc/task_prolog.sh"


@pytest.mark.parametrize(("host", "only"), [("127.0.0.1", True), ("127.0.1.1", False), ("name.invalid", False)])
def test_plain_daemons_listen_on_the_loopback_alone_only_where_the_host_name_means_it(host: str, only: bool) -> None:
    assert is_loopback(host) is only
    assert ("CommunicationParameters" in slurm_conf(INFO, loopback_only=only)) is only
