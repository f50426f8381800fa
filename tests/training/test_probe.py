"""The all-reduce probe, under two real torchrun agents."""

from __future__ import annotations

from pathlib import Path

import pytest
from training_run import CPU, NODES, all_output, run_on_nodes, write_run_folder

from janus_cluster.errors import UsageError
from janus_cluster.run.files import read_json, write_json_atomically
from janus_cluster.run.records.rails import RailTest
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
    assert codes == [0, 0], all_output(run)
    first, second = (read_json(run.all_reduce_json(1, node)) for node in NODES[:2])
    own = {key: (first.pop(key), second.pop(key)) for key in ("node", "gemm", "intra_node", "duration_s")}
    assert own["node"] == NODES[:2]
    assert first == second, "the slowest rank decides, so both nodes report the same"
    assert (first["world_size"], first["backend"], first["payload_bytes"]) == (4, "gloo", 2_000_000)
    assert len(first["times_s"]) == 4 and all(t > 0 for t in first["times_s"])
    assert first["sum_correct"] is True
    assert len(first["ranks"]) == 4
    assert [[g["rank"] for g in gemm] for gemm in own["gemm"]] == [[0, 1], [2, 3]]
    assert all(g["tflops"] > 0 and g["consistent"] for gemm in own["gemm"] for g in gemm)
    assert all(part["num_ranks"] == 2 and part["sum_correct"] for part in own["intra_node"])
    tests = [RailTest.from_json(test) for test in first["rails"]]
    assert {(test.rail, test.together) for test in tests} == {(n, t) for n in "ab" for t in (False, True)}
    for test in tests:
        assert test.nodes == NODES[:2]
        assert len(test.times_s) == 8
        assert not test.is_broken


@pytest.mark.parametrize("interface", ["lo", ""])
def test_on_four_nodes_each_rail_is_tested_in_disjoint_pairs(tmp_path: Path, interface: str) -> None:
    """By interface the first rank of a node has all rails; by GPU, here without one, each rank has its own."""
    processes = {"processes_per_node": 1 if interface else 2}
    run = write_run_folder(tmp_path / "run", JOB | {"nodes": 4, "hardware": CPU["hardware"] | processes})
    rails = [{"name": name, "interfaces": dict.fromkeys(NODES, interface)} for name in "ab"]
    write_json_atomically(run.rails_json(1), {"rails": rails})
    codes = run_on_nodes("janus_cluster.training.probe", run, "--iterations", "1", "--warmups", "0")
    assert codes == [0] * 4, all_output(run)
    for node in NODES:
        tests = [RailTest.from_json(test) for test in read_json(run.all_reduce_json(1, node))["rails"]]
        assert not any(test.is_broken for test in tests), tests
        assert all(node in test.nodes for test in tests), "a node reports the pairs that it was part of"
        for name in "ab":
            # lo is no wire: under load a test may be slow, and is then repeated with others.
            first = next(test for test in tests if test.rail == name and not test.together)
            assert first.nodes in ((NODES[0], NODES[2]), (NODES[1], NODES[3]))
            assert any(test.rail == name and test.together for test in tests)


def rail_tests(rates: dict[str, float]) -> list[RailTest]:
    return [
        RailTest(rail=rail, nodes=NODES[:2], together=False, payload_bytes=10**8, times_s=(0.1 / rate,) * 3)
        for rail, rate in rates.items()
    ]


@pytest.mark.parametrize(
    ("rates", "slow"),
    [
        ({f"ib{i}": 10.0 for i in range(4)}, []),
        ({f"ib{i}": 10.0 for i in range(3)} | {"ib3": 5.0}, ["ib3"]),
        ({"ib0": 10.0, "ib1": 5.0}, ["ib1"]),
        ({"ib0": 6.9, "ib1": 10.0}, ["ib0"]),
        ({"ib0": 7.1, "ib1": 10.0}, []),
        ({"ib0": 0.5}, ["ib0"]),
    ],
)
def test_a_slow_rail_is_measured_again_and_a_sound_one_is_not(rates: dict[str, float], slow: list[str]) -> None:
    settings = {"busbw_gb_per_s": {"fail_below": 1.0}, "of_median": {"fail_below": 0.7}}
    tests = rail_tests(rates)
    assert [test.rail for test in find_slow(tests, tests, settings, {})] == slow


def test_the_sites_own_floor_makes_a_rail_slow_too() -> None:
    settings = {"busbw_gb_per_s": {"fail_below": 1.0}}
    tests = rail_tests({"ib0": 7.0, "ib1": 9.0})
    assert [test.rail for test in find_slow(tests, tests, settings, {"rail.ib0": 8.0, "rail.ib1": 8.0})] == ["ib0"]


def test_payload_argument_wins_over_the_job(tmp_path: Path) -> None:
    run = write_run_folder(tmp_path / "run", JOB)
    codes = run_on_nodes("janus_cluster.training.probe", run, "--payload-mb", "0.5", "--iterations", "1")
    assert codes == [0, 0], all_output(run)
    assert read_json(run.all_reduce_json(1, NODES[0]))["payload_bytes"] == 500_000


def test_a_process_that_torchrun_did_not_start_is_refused() -> None:
    with pytest.raises(UsageError, match="RANK, LOCAL_RANK and WORLD_SIZE"):
        load_world("cpu", {"RANK": "0"})


def test_world_reads_what_torchrun_sets() -> None:
    world = load_world("cpu", {"RANK": "9", "LOCAL_RANK": "1", "WORLD_SIZE": "16"})
    assert (world.rank, world.local_rank, world.world_size, world.backend) == (9, 1, 16, "gloo")
    assert not world.is_main and not world.is_node_main
