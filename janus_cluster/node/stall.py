"""Adds to a hang what the ranks wrote while training made no progress; runs torch's own analysis of their traces."""

from __future__ import annotations

import pickle
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from janus_cluster.diagnosis.stall import describe_ranks, judge_stall, load_stalls
from janus_cluster.node.batch_log import log_line
from janus_cluster.run.files import name_of_trouble, write_text_atomically
from janus_cluster.run.paths import RunDir
from janus_cluster.run.records.attempt import HangRecord, HeartbeatRecord
from janus_cluster.run.records.stall import is_finished, parse_trace

_MODULE = "torch.distributed.flight_recorder.fr_trace"
# It imports torch, which takes 2 s from a disk and longer from a file system that many nodes read.
_TIMEOUT_S = 60.0


def with_collective(run: RunDir, hang: HangRecord, *, attempt: int, world_size: int) -> HangRecord:
    """The hang with the collective that does not finish; as it was where no rank wrote of one."""
    beats = (HeartbeatRecord.load(run.heartbeat_json(attempt, rank)) for rank in range(world_size))
    nodes = {beat.rank: beat.node for beat in beats if beat is not None}
    records = load_stalls(run, attempt=attempt, world_size=world_size)
    stall = judge_stall(records, world_size=world_size, nodes=nodes)
    if stall is None:
        return hang
    found = replace(hang, collective=stall.message, missing=stall.missing, frames=stall.frames)
    if hang.rank is not None or not stall.missing:
        return found
    places = {nodes.get(rank) for rank in stall.missing}
    rank = stall.missing[0] if len(stall.missing) == 1 else None
    return replace(found, rank=rank, node=places.pop() if len(places) == 1 else None)


def write_analysis(run: RunDir, *, attempt: int, world_size: int, python: str = sys.executable) -> None:
    """stall/analysis.txt holds torch's own analysis of the traces, or why there is none. Never raises."""
    traces = load_traces(run, attempt=attempt, world_size=world_size)
    if not traces:
        return
    path = run.stall_analysis(attempt)
    try:
        with tempfile.TemporaryDirectory(prefix="janus-stall-") as folder:
            notes = write_all_traces(Path(folder) / run.stall_trace_prefix(attempt).name, traces, world_size=world_size)
            text = _run_analysis([python, "-m", _MODULE, folder, "--prefix", run.stall_trace_prefix(attempt).name])
        write_text_atomically(path, "\n".join([*notes, without_repeats(text), ""]))
        log_line(f"training: torch's analysis of the ranks' traces is in {path}")
    except OSError as error:
        log_line(f"{path}: {name_of_trouble(error)}")


def load_traces(run: RunDir, *, attempt: int, world_size: int) -> dict[int, dict[str, Any]]:
    """Rank → its flight recorder's trace, of the ranks that left one."""
    found = {}
    for rank in range(world_size):
        try:
            found[rank] = parse_trace(run.stall_trace(attempt, rank).read_bytes())
        except (OSError, ValueError):
            continue
    return found


def write_all_traces(prefix: Path, traces: Mapping[int, dict[str, Any]], *, world_size: int) -> list[str]:
    """Every rank has a trace under `prefix`: torch's analysis decides nothing where one is absent.

    A collective that has finished was called by all; so a rank without a trace gets those that have finished on the
    rank where the fewest have.
    Returns: which ranks those are.
    """
    finished = {rank: [e for e in trace["entries"] if is_finished(e)] for rank, trace in traces.items()}
    fewest = min(finished, key=lambda rank: len(finished[rank]))
    absent = [rank for rank in range(world_size) if rank not in traces]
    for rank in range(world_size):
        trace = traces.get(rank) or traces[fewest] | {"entries": finished[fewest]}
        Path(f"{prefix}{rank}").write_bytes(pickle.dumps(trace, protocol=2))
    whose = describe_ranks(absent, {})
    return [f"{whose}: no trace; taken to have called what finished on rank {fewest}"] if absent else []


def _run_analysis(argv: Sequence[str]) -> str:
    try:
        done = subprocess.run(
            argv,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            timeout=_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"torch's analysis did not end within {_TIMEOUT_S:.0f} s"
    return done.stdout.decode("utf-8", "replace")


def without_repeats(text: str) -> str:
    """The text with each line that follows itself once: the analysis repeats one for every collective it skips."""
    return re.sub(r"^(.*)$(?:\n\1$)+", r"\1", text.strip(), flags=re.MULTILINE)
