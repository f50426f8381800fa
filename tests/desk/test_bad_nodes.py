"""The memory of bad nodes: one file, many writers, and what is forgiven stays forgiven."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from janus_cluster.desk.bad_nodes import (
    DAY_S,
    KEEP_DAYS,
    NodeRecord,
    add_node,
    forgive_nodes,
    live_nodes,
    load_nodes,
    nodes_json,
    remember_nodes,
)
from janus_cluster.errors import UsageError

NOW = 1_795_000_000.0


def record(node: str = "h800-02", *, run: str = "demo-1", at: float = NOW, cluster: str = "slurm") -> NodeRecord:
    return NodeRecord(node=node, cluster=cluster, kind="preflight", reason="gpu.count: 7", run=run, attempt=1, time=at)


def names(folder: Path, *, now: float = NOW, days: float = 7, cluster: str = "slurm") -> list[str]:
    return [r.node for r in live_nodes(cluster, now=now, forget_after_days=days, folder=folder)]


def test_the_same_event_is_remembered_once(tmp_path: Path) -> None:
    assert remember_nodes([record()], now=NOW, folder=tmp_path) == [record()]
    assert remember_nodes([record()], now=NOW, folder=tmp_path) == []
    assert len(load_nodes(tmp_path)) == 1
    assert names(tmp_path) == ["h800-02"]


def test_what_was_forgiven_is_not_learnt_again_from_the_same_run(tmp_path: Path) -> None:
    remember_nodes([record()], now=NOW, folder=tmp_path)
    assert forgive_nodes(["h800-02"], now=NOW + 1, folder=tmp_path) == ["h800-02"]
    remember_nodes([record()], now=NOW + 2, folder=tmp_path)
    assert names(tmp_path) == []
    remember_nodes([record(run="demo-2")], now=NOW + 3, folder=tmp_path)
    assert names(tmp_path) == ["h800-02"]


@pytest.mark.parametrize(("age_days", "is_live"), [(6.99, True), (7.0, False), (7.01, False)])
def test_time_forgives(tmp_path: Path, age_days: float, is_live: bool) -> None:
    remember_nodes([record()], now=NOW, folder=tmp_path)
    assert bool(names(tmp_path, now=NOW + age_days * DAY_S)) is is_live


def test_another_cluster_has_another_memory(tmp_path: Path) -> None:
    remember_nodes([record(cluster="sandbox")], now=NOW, folder=tmp_path)
    assert names(tmp_path) == []
    assert names(tmp_path, cluster="sandbox") == ["h800-02"]


def test_old_records_leave_the_file_and_do_not_come_back(tmp_path: Path) -> None:
    remember_nodes([record()], now=NOW, folder=tmp_path)
    later = NOW + KEEP_DAYS * DAY_S
    remember_nodes([record(run="demo-9", at=later)], now=later, folder=tmp_path)
    assert [r.run for r in load_nodes(tmp_path)] == ["demo-9"]
    assert remember_nodes([record()], now=later, folder=tmp_path) == []


def test_a_file_that_cannot_be_read_now_is_not_written_anew(tmp_path: Path) -> None:
    # A loop of links simulates a network file system's error: the file is there, and reading fails.
    nodes_json(tmp_path).symlink_to(nodes_json(tmp_path))
    assert load_nodes(tmp_path) == []
    with pytest.raises(UsageError, match="cannot read the record of bad nodes"):
        add_node("h800-01", cluster="slurm", reason="fan broken", now=1.0, folder=tmp_path)
    assert nodes_json(tmp_path).is_symlink()


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{", b'{"nodes": [1, {"node": "x"}, null]}', b"\xff", b'{"nodes": 3}']
)
def test_a_damaged_file_is_an_empty_memory_that_can_be_written_again(tmp_path: Path, content: bytes) -> None:
    nodes_json(tmp_path).write_bytes(content)
    assert load_nodes(tmp_path) == []
    remember_nodes([record()], now=NOW, folder=tmp_path)
    assert names(tmp_path) == ["h800-02"]


@pytest.mark.parametrize("node", ["", "a,b", "h800-[01-02]", "--all", "a b", "x\n", "../x"])
def test_a_name_that_sbatch_would_read_otherwise_is_never_remembered(tmp_path: Path, node: str) -> None:
    assert remember_nodes([record(node)], now=NOW, folder=tmp_path) == []
    with pytest.raises(UsageError):
        add_node(node, cluster="slurm", reason="x", now=NOW, folder=tmp_path)


def test_the_file_is_private(tmp_path: Path) -> None:
    folder = tmp_path / "site"
    remember_nodes([record()], now=NOW, folder=folder)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE(nodes_json(folder).stat().st_mode) == 0o600


def test_writers_at_the_same_time_lose_nothing(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from janus_cluster.desk.bad_nodes import NodeRecord, remember_nodes\n"
        "for i in range(20):\n"
        f"    r = NodeRecord(node=f'n{{sys.argv[1]}}-{{i}}', cluster='slurm', kind='x', reason='y', time={NOW})\n"
        f"    remember_nodes([r], now={NOW}, folder=Path({str(tmp_path)!r}))\n"
    )
    writers = [subprocess.Popen([sys.executable, "-c", code, str(i)]) for i in range(4)]
    assert [w.wait(timeout=600) for w in writers] == [0] * 4
    assert len(load_nodes(tmp_path)) == 80


def type_in(home: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "janus_cluster.cli", "nodes", *argv],
        env=os.environ | {"JANUS_HOME": str(home)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def test_the_command_adds_lists_and_forgives(tmp_path: Path) -> None:
    assert "no node is recorded" in type_in(tmp_path).stdout
    assert type_in(tmp_path, "add", "h800-01", "--reason", "fan \x1b[31mbroken").returncode == 0
    remember_nodes([record(at=time.time() - 7200)], now=time.time(), folder=tmp_path / "site")
    listed = type_in(tmp_path).stdout
    assert re.search(r"^h800-01  by hand: fan broken  \[\d+ (s|min) ago\]$", listed, re.MULTILINE)
    assert re.search(r"^h800-02  preflight: gpu.count: 7  \[12\d min ago, run demo-1\]$", listed, re.MULTILINE)
    values = json.loads(type_in(tmp_path, "--json").stdout)
    assert [(v["node"], v["kind"], v["excluded"]) for v in values] == [
        ("h800-01", "by hand", True),
        ("h800-02", "preflight", True),
    ]
    assert "forgiven: h800-02" in type_in(tmp_path, "forgive", "h800-02").stdout
    assert type_in(tmp_path, "forgive", "h800-02").returncode == 2
    assert "h800-02" not in type_in(tmp_path).stdout
    assert "forgiven" in type_in(tmp_path, "--all").stdout
    assert "forgiven: h800-01" in type_in(tmp_path, "forgive", "--all").stdout
    assert type_in(tmp_path, "forgive").returncode == 2
