"""What an interruption cost, from the run folders it happened in: python -m benchmarks.recovery RUN_FOLDER …

A row for every attempt that another one followed. Units: seconds; `found`: from the last step that was logged to the
attempt's end, `queue`: until the next attempt began (in Slurm's queue, or at once in the same allocation), `start`:
until its first step was logged; steps that were done again were worked on since the checkpoint.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from janus_cluster.rundir import RunDir, read_json


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """One interruption of a run."""

    attempt: int
    reason: str
    last_step: int
    first_step: int
    found_s: float | None
    queue_s: float | None
    start_s: float

    @property
    def steps_again(self) -> int:
        return max(0, self.last_step + 1 - self.first_step)


def load_recoveries(run: RunDir) -> list[Recovery]:
    """Every interruption after which training went on. Raises: OSError, ValueError for a folder without records."""
    steps = [e for e in run.read_metrics() if e["kind"] == "train"]
    records = {n: read_json(run.attempt_json(n)) for n in run.attempts()}
    found = []
    for attempt, after in zip(records, list(records)[1:], strict=False):
        before = [e for e in steps if e["attempt"] == attempt]
        again = [e for e in steps if e["attempt"] == after]
        if not before or not again:
            continue
        # An attempt whose process was killed with its node has no end of its own.
        ended = records[attempt]["ended_at"]
        began = records[after]["started_at"]
        found.append(
            Recovery(
                attempt=attempt,
                reason=str(records[attempt]["reason"] or "the attempt itself was killed"),
                last_step=before[-1]["step"],
                first_step=again[0]["step"],
                found_s=ended and ended - before[-1]["time"],
                queue_s=ended and began - ended,
                start_s=again[0]["time"] - began,
            )
        )
    return found


def render_table(recoveries: Sequence[Recovery]) -> str:
    """Markdown, a row an interruption."""
    lines = [
        "| how the attempt ended | steps done again | found s | queue s | start s |",
        "| --- | --- | --- | --- | --- |",
    ]
    for r in recoveries:
        seconds = ["–" if s is None else f"{s:.1f}" for s in (r.found_s, r.queue_s, r.start_s)]
        lines.append(f"| {r.reason.replace('|', '/')} | {r.steps_again} | {' | '.join(seconds)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recovery", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders")
    folders = parser.parse_args().runs
    print(render_table([recovery for folder in folders for recovery in load_recoveries(RunDir(folder))]))


if __name__ == "__main__":
    main()
