"""Lists of nodes as people read them."""

from __future__ import annotations

import pytest

from janus_cluster.run.hosts import fold_nodes
from janus_cluster.slurm.commands import parse_hostlist


@pytest.mark.parametrize(
    ("nodes", "text"),
    [
        ([], ""),
        (["h800-01"], "h800-01"),
        (["h800-01", "h800-02"], "h800-01, h800-02"),
        (["h800-01,h800-02"], "h800-01,h800-02"),
        ([f"h800-{k:02d}" for k in range(1, 65)], "h800-[01-64]"),
        (["h800-01,h800-02", "h800-03", "h800-07", "login"], "h800-[01-03,07], login"),
        (["n9", "n10", "n11"], "n9, n[10-11]"),
        (["a", "b", "c"], "a, b, c"),
    ],
)
def test_two_nodes_are_written_out_and_more_as_slurm_does(nodes: list[str], text: str) -> None:
    assert fold_nodes(nodes) == text
    assert parse_hostlist(text.replace(" ", "")) == tuple(name for node in nodes for name in node.split(","))
