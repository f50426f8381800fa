from __future__ import annotations

import sys
from collections.abc import Collection
from pathlib import Path

import pytest

from janus_cluster.desk.bad_nodes import NodeRecord, remember_nodes
from janus_cluster.desk.exclude import decide_exclusion, merge_hosts
from janus_cluster.desk.submit import exclude_bad_nodes
from janus_cluster.job.load import load_job
from janus_cluster.job.resolve import resolve_job
from janus_cluster.job.resources import jobs_dir

NOW = 1_795_000_000.0


def bad(node: str, age_s: float = 3600) -> NodeRecord:
    return NodeRecord(node=node, cluster="slurm", kind="node_lost", reason="was lost", time=NOW - age_s)


@pytest.mark.parametrize(
    ("lists", "merged"),
    [
        ((None, None), None),
        (("", "h1"), "h1"),
        (("h1", "h1"), "h1"),
        (("h-[01-03]", "h-02"), "h-[01-03]"),
        (("h-[01-02]", "h-[02-03]"), "h-[01-02],h-03"),
        (("h1,h2", None, "h3"), "h1,h2,h3"),
    ],
)
def test_host_lists_are_merged(lists: tuple[str | None, ...], merged: str | None) -> None:
    assert merge_hosts(*lists) == merged


@pytest.mark.parametrize(
    ("given", "wanted", "site", "option", "added"),
    [
        (None, None, {"h1", "h2", "h3"}, "h1", ("h1",)),
        ("h3", None, {"h1", "h2", "h3", "h4"}, "h3,h1", ("h1",)),
        ("h1", None, {"h1", "h2", "h3"}, "h1", ()),
        # The site's nodes are unknown: the records count.
        (None, None, None, "h1", ("h1",)),
        # Just enough nodes, and one too few.
        (None, None, {"h1", "h2", "h3"}, "h1", ("h1",)),
        (None, None, {"h1", "h2"}, None, ()),
        ("h3", None, {"h1", "h2", "h3"}, "h3", ()),
        # A node that is gone from the site cannot be excluded.
        (None, None, {"h2", "h3", "h4"}, None, ()),
        # Asked for by name.
        (None, "h1,h2", {"h1", "h2", "h3"}, None, ()),
        # sbatch reads a path as a file of names.
        ("/etc/bad-nodes", None, {"h1", "h2", "h3"}, "/etc/bad-nodes", ()),
    ],
)
def test_remembered_nodes_join_the_users_own_list(
    given: str | None, wanted: str | None, site: Collection[str] | None, option: str | None, added: tuple[str, ...]
) -> None:
    found = decide_exclusion(given, [bad("h1")], num_nodes=2, site_nodes=site, now=NOW, wanted=wanted)
    assert (found.option, found.added) == (option, added)


def test_where_nodes_are_short_the_one_remembered_longest_is_used_again_and_that_is_noted() -> None:
    remembered = [bad("h1", age_s=86400 * 3), bad("h2", age_s=60)]
    found = decide_exclusion(None, remembered, num_nodes=2, site_nodes={"h1", "h2", "h3"}, now=NOW)
    assert found.added == ("h2",)
    assert found.notes == (
        "h2 is left out: node_lost: was lost, 60 s ago",
        "h1 is recorded as bad (node_lost: was lost, 3 d 0 h ago), but without it fewer than 2 nodes are left: "
        "not left out, the gate judges it again",
        "janus-cluster nodes forgive h2 h1 lifts it",
    )


def test_without_a_gate_it_is_not_judged() -> None:
    found = decide_exclusion(None, [bad("h1")], num_nodes=2, site_nodes={"h1", "h2"}, now=NOW, is_gated=False)
    assert "no gate will judge it" in found.notes[0]


@pytest.mark.parametrize(
    ("h3", "option"),
    [("gpu:h800:8", "h1"), ("gpu:v100:4", None), ("(null)", None)],
    ids=["one like them", "another kind of GPU", "no GPU"],
)
def test_a_node_without_the_jobs_gpus_takes_no_bad_nodes_place(
    h3: str, option: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sinfo = tmp_path / "sinfo"
    sinfo.write_text(f"#!/bin/sh\necho 'h1 idle gpu:h800:8(S:0-1)\nh2 idle gpu:h800:8(S:0-1)\nh3 idle {h3}'\n")
    sinfo.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    remember_nodes([bad("h1")], now=NOW, folder=tmp_path)
    loaded = load_job(jobs_dir() / "preflight.yaml", sets=["nodes=2"], environ={})
    run_dir = tmp_path / "run"
    resolved = resolve_job(loaded, run_dir=run_dir, cluster="slurm", environ={}, cwd=tmp_path, python=sys.executable)
    assert exclude_bad_nodes(resolved, slurm_conf=None, site=tmp_path, now=NOW).option == option
