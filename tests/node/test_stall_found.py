"""A hang with its collective, and torch's own analysis of traces in NCCL's shape."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from trace_files import entry, write_trace

from janus_cluster.node.stall import with_collective, without_repeats, write_analysis
from janus_cluster.run.paths import RunDir
from janus_cluster.run.records.attempt import HangRecord, HeartbeatRecord

HANG = HangRecord(message="no progress of any rank for 12 s, step 7: all ranks are alive and wait")


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """Ranks 0 and 1 wait in the third collective, rank 2 of node-2 gave no answer."""
    run = RunDir(tmp_path)
    run.heartbeat_json(1, 0).parent.mkdir(parents=True)
    for rank, node in enumerate(("node-1", "node-1", "node-2")):
        beat = HeartbeatRecord(rank=rank, node=node, doing="step", step=7, has_begun=True, count=9, time=1.0)
        beat.write(run.heartbeat_json(1, rank))
    for rank in (0, 1):
        entries = [entry(1), entry(2, "_all_gather_base"), entry(3, "broadcast", state="scheduled")]
        write_trace(run.stall_trace(1, rank), entries, world_size=3)
    return run


def test_a_hang_in_which_all_heartbeats_go_on_gets_its_rank_from_the_traces(run: RunDir) -> None:
    hang = with_collective(run, HANG, attempt=1, world_size=3)
    assert (hang.rank, hang.node, hang.missing) == (2, "node-2", (2,))
    assert hang.message == HANG.message
    assert hang.collective == (
        "rank 2 on node-2 did not join broadcast #3 (BFloat16 [8]), in which ranks 0–1 wait; it gave no answer"
    )


def test_where_all_missing_ranks_are_of_one_node_the_node_is_named(run: RunDir) -> None:
    for path in (run.stall_trace(1, 0), run.stall_trace(1, 1)):
        path.unlink()
    write_trace(run.stall_trace(1, 2), [entry(3, state="scheduled")], world_size=3)
    hang = with_collective(run, HANG, attempt=1, world_size=3)
    assert (hang.rank, hang.node, hang.missing) == (None, "node-1", (0, 1))


def test_the_rank_that_the_heartbeats_name_stays(run: RunDir) -> None:
    silent = HangRecord(rank=1, node="node-1", message="no progress")
    hang = with_collective(run, silent, attempt=1, world_size=3)
    assert (hang.rank, hang.node) == (1, "node-1")


def test_without_a_word_of_the_ranks_the_hang_is_as_the_watchdog_found_it(tmp_path: Path) -> None:
    assert with_collective(RunDir(tmp_path), HANG, attempt=1, world_size=3) == HANG
    write_analysis(RunDir(tmp_path), attempt=1, world_size=3)
    assert not RunDir(tmp_path).stall_analysis(1).exists()


@pytest.mark.train
def test_torchs_own_analysis_names_the_rank_too(run: RunDir) -> None:
    pytest.importorskip("torch.distributed.flight_recorder.fr_trace", reason="newer than this torch")
    write_analysis(run, attempt=1, world_size=3)
    text = run.stall_analysis(1).read_text()
    assert text.startswith("rank 2: no trace; taken to have called what finished on rank 0"), text
    for words in ("Not all ranks joining collective, sequence number: 3", "nccl:broadcast", "missing ranks: {2}"):
        assert words in text, text


@pytest.mark.parametrize("python", ["/no/python", sys.executable])
def test_a_torch_without_the_analysis_costs_no_more_than_the_analysis(
    run: RunDir, python: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(run.path))
    (run.path / "torch").mkdir()
    (run.path / "torch" / "__init__.py").touch()
    write_analysis(run, attempt=1, world_size=3, python=python)
    if python == sys.executable:
        assert "No module named" in run.stall_analysis(1).read_text()
    else:
        assert "ENOENT" in capsys.readouterr().out


def test_a_line_that_repeats_itself_is_written_once() -> None:
    assert without_repeats("a\nb\nb\nb\na\n") == "a\nb\na"
