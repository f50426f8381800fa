"""The all-reduce probe, under two real torchrun agents."""

from __future__ import annotations

from pathlib import Path

import pytest
from training_run import CPU, NODES, everything_said, run_on_nodes, write_run_folder

from janus_cluster.errors import UsageError
from janus_cluster.rundir import read_json, write_json_atomically
from janus_cluster.training.probe_rails import find_slow
from janus_cluster.training.world import load_world

pytestmark = pytest.mark.train

JOB = {"kind": "preflight", "preflight": {"all_reduce_mb": 2}}


def test_each_node_gets_a_record_of_the_whole_world(tmp_path: Path) -> None:
    run = write_run_folder(tmp_path / "run", JOB | {"hardware": CPU["hardware"] | {"processes_per_node": 2}})
    lo = dict.fromkeys(NODES, "lo")
    rails = [{"name": "a", "interfaces": lo}, {"name": "b", "interfaces": lo}]
    write_json_atomically(run.rails_json(1), {"rails": rails})
    codes = run_on_nodes("janus_cluster.training.probe", run, "--iterations", "4")
    assert codes == [0, 0], everything_said(run)
    first, second = (read_json(run.all_reduce_json(1, node)) for node in NODES)
    own = {key: (first.pop(key), second.pop(key)) for key in ("node", "gemm", "intra_node", "duration_s")}
    assert own["node"] == NODES
    assert first == second, "the slowest rank decides, so both nodes report the same"
    assert (first["world_size"], first["backend"], first["payload_bytes"]) == (4, "gloo", 2_000_000)
    assert len(first["times_s"]) == 4 and all(t > 0 for t in first["times_s"])
    assert first["sum_correct"] is True
    assert len(first["ranks"]) == 4
    assert [[g["rank"] for g in gemm] for gemm in own["gemm"]] == [[0, 1], [2, 3]]
    assert all(g["tflops"] > 0 and g["consistent"] for gemm in own["gemm"] for g in gemm)
    assert all(part["num_ranks"] == 2 and part["sum_correct"] for part in own["intra_node"])
    assert [rail["name"] for rail in first["rails"]] == ["a", "b"]
    for rail in first["rails"]:
        assert (len(rail["times_s"]), len(rail["together_s"])) == (8, 8)
        assert rail["sum_correct"] and rail["error"] is None


def test_a_slow_rail_is_measured_again_and_a_sound_one_is_not() -> None:
    settings = {"busbw_gb_per_s": {"fail_below": 1.0}, "of_median": {"fail_below": 0.7}}
    sound = {f"ib{i}": [0.01] * 3 for i in range(4)}
    assert find_slow(sound, 10**8, settings) == []
    assert find_slow(sound | {"ib3": [0.02] * 3}, 10**8, settings) == ["ib3"]
    assert find_slow({"ib0": [0.01], "ib1": [0.02]}, 10**8, settings) == ["ib1"], "two rails: the slower one"
    assert find_slow({"ib0": [0.01 / 0.69], "ib1": [0.01]}, 10**8, settings) == ["ib0"]
    assert find_slow({"ib0": [0.01 / 0.71], "ib1": [0.01]}, 10**8, settings) == []
    assert find_slow({"ib0": [0.2]}, 10**8, settings) == ["ib0"], "alone, against the floor"


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
