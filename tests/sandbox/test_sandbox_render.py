from __future__ import annotations

import ipaddress
from dataclasses import replace
from pathlib import Path

import jinja2
import pytest

from janus_cluster.errors import SandboxFailed
from janus_cluster.sandbox import SandboxInfo
from janus_cluster.sandbox.layout import Layout, layout_of
from janus_cluster.sandbox.network import NetworkPlan
from janus_cluster.sandbox.render import (
    render_gres_conf,
    render_hosts,
    render_slurm_conf,
    render_slurmdbd_conf,
    render_template,
)
from janus_cluster.sandbox.state import Node

LAYOUT = Layout(Path("/srv/box"))
PLAN = NetworkPlan("a1b2c3", ipaddress.IPv4Network("198.18.7.0/24"), 2)


def plain_info() -> SandboxInfo:
    nodes = (Node("h800-01", "127.0.0.1", 17001, "/m1"), Node("h800-02", "127.0.0.1", 17002, "/m2"))
    return SandboxInfo(
        "/srv/box", "plain", "/srv/box/etc/slurm.conf", "boot", False, 17000, nodes, slurm_version="22.05.8"
    )


def namespaces_info() -> SandboxInfo:
    nodes = PLAN.nodes(["/m1", "/m2"])
    conf = "/srv/box/etc/slurm.conf"
    info = SandboxInfo("/srv/box", "namespaces", conf, "boot", True, 6817, nodes, network=PLAN.network())
    return replace(info, accounting_port=6819, slurm_version="24.11.5")


def parse(text: str) -> dict[str, str]:
    """Key → value of each line of slurm.conf that holds one."""
    return dict(line.split("=", 1) for line in text.splitlines() if line and not line.startswith("#"))


def slurm_conf(info: SandboxInfo, host: str) -> str:
    return render_slurm_conf(
        LAYOUT,
        info,
        user="u",
        controller_host=host,
        real_memory_mb=23000,
        loopback_only=info.mode == "plain",
    )


def test_plain_nodes_share_the_host_and_differ_by_port_and_listen_on_loopback_only() -> None:
    text = slurm_conf(plain_info(), "box")
    lines = [line for line in text.splitlines() if line.startswith("NodeName=")]
    assert [line.split()[:4] for line in lines] == [
        ["NodeName=h800-01", "NodeHostname=box", "NodeAddr=127.0.0.1", "Port=17001"],
        ["NodeName=h800-02", "NodeHostname=box", "NodeAddr=127.0.0.1", "Port=17002"],
    ]
    assert parse(text)["CommunicationParameters"] == "NoCtldInAddrAny,NoInAddrAny"
    assert parse(text)["SlurmctldHost"] == "box(127.0.0.1)"
    assert parse(text)["AccountingStorageType"] == "accounting_storage/none"


def test_hosts_of_their_own_have_addresses_and_names_of_their_own() -> None:
    text = slurm_conf(namespaces_info(), "ctl")
    assert "NodeName=h800-02 NodeHostname=h800-02 NodeAddr=198.18.7.2 Port=6818" in text
    assert parse(text)["SlurmctldHost"] == "ctl(198.18.7.14)"
    assert "CommunicationParameters" not in parse(text)
    assert parse(text)["AccountingStorageHost"] == "198.18.7.14"
    assert parse(text)["AccountingStoragePass"] == "/srv/box/run/munge.socket"


def test_every_path_is_in_the_sandbox() -> None:
    values = parse(slurm_conf(plain_info(), "box"))
    paths = [v.removeprefix("socket=") for k, v in values.items() if "/srv" in v or k.endswith(("Location", "Dir"))]
    assert len(paths) == 7
    assert all(path.startswith("/srv/box/") for path in paths)


def test_eight_gpus_are_files_on_each_node() -> None:
    lines = render_gres_conf(LAYOUT, plain_info()).splitlines()
    assert lines[1:] == [
        "AutoDetect=off",
        "NodeName=h800-01 Name=gpu Type=h800 File=/srv/box/dev/nvidia[0-7]",
        "NodeName=h800-02 Name=gpu Type=h800 File=/srv/box/dev/nvidia[0-7]",
    ]


def test_slurmdbd_listens_where_slurm_conf_looks_for_it() -> None:
    info = namespaces_info()
    dbd = parse(render_slurmdbd_conf(LAYOUT, info, user="u", controller_host="ctl"))
    conf = parse(slurm_conf(info, "ctl"))
    assert (dbd["DbdAddr"], dbd["DbdPort"]) == (conf["AccountingStorageHost"], conf["AccountingStoragePort"])


def test_a_template_value_that_is_not_given_is_an_error() -> None:
    with pytest.raises(jinja2.UndefinedError, match="gpu_type"):
        render_template("gres.conf.j2", nodes=namespaces_info().nodes)


def test_hosts_file_has_loopback_and_every_pair() -> None:
    assert render_hosts([("198.18.7.1", "h800-01")]).splitlines()[0] == "127.0.0.1 localhost"
    assert "198.18.7.1 h800-01\n" in render_hosts([("198.18.7.1", "h800-01")])


def test_a_long_folder_keeps_its_sockets_in_a_short_one() -> None:
    long = layout_of(Path("/srv") / ("d" * 90))
    assert len(str(long.munge_socket)) < 60
    assert long.slurm_conf.is_relative_to(long.home)
    assert Layout(Path("/srv/box")).munge_socket == Path("/srv/box/run/munge.socket")


@pytest.mark.parametrize("name", ["a b", "a,b", "a=b", "a#b", "é", 'a"b', "a\nb", "a%n"])
def test_a_folder_that_slurm_conf_cannot_name_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(SandboxFailed, match=r"slurm\.conf can only name") as caught:
        layout_of(tmp_path / name)
    assert "JANUS_HOME" in str(caught.value.hint)
