"""The all-reduce probe, under two real torchrun agents."""

from __future__ import annotations

from pathlib import Path

import pytest
from training_run import NODES, everything_said, run_on_nodes, write_run_folder

from janus_cluster.errors import UsageError
from janus_cluster.rundir import read_json
from janus_cluster.training.world import load_world

pytestmark = pytest.mark.train

JOB = {"kind": "preflight", "preflight": {"all_reduce_mb": 2}}


def test_each_node_gets_a_record_of_the_whole_world(tmp_path: Path) -> None:
    run = write_run_folder(tmp_path / "run", JOB)
    codes = run_on_nodes("janus_cluster.training.probe", run, "--iterations", "4")
    assert codes == [0, 0], everything_said(run)
    first, second = (read_json(run.all_reduce_json(1, node)) for node in NODES)
    assert [first.pop("node"), second.pop("node")] == list(NODES)
    assert first == second, "the slowest rank decides, so both nodes report the same"
    assert (first["world_size"], first["backend"], first["payload_bytes"]) == (2, "gloo", 2_000_000)
    assert len(first["times_s"]) == 4 and all(t > 0 for t in first["times_s"])
    assert first["sum_correct"] is True
    assert len(first["ranks"]) == 2


def test_payload_argument_wins_over_the_job(tmp_path: Path) -> None:
    run = write_run_folder(tmp_path / "run", JOB)
    codes = run_on_nodes("janus_cluster.training.probe", run, "--payload-mb", "0.5", "--iterations", "1")
    assert codes == [0, 0], everything_said(run)
    assert read_json(run.all_reduce_json(1, NODES[0]))["payload_bytes"] == 500_000


def test_a_process_that_torchrun_did_not_start_is_refused() -> None:
    with pytest.raises(UsageError, match="RANK, LOCAL_RANK and WORLD_SIZE"):
        load_world("cpu", {"RANK": "0"})


def test_world_reads_what_torchrun_sets() -> None:
    world = load_world("cpu", {"RANK": "9", "LOCAL_RANK": "1", "WORLD_SIZE": "16"})
    assert (world.rank, world.local_rank, world.world_size, world.backend) == (9, 1, 16, "gloo")
    assert not world.is_main and not world.is_node_main
