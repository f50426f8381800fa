"""Who looks for a failure's cause sees what was printed, without the times that stand before it."""

from __future__ import annotations

from pathlib import Path

from janus_cluster.diagnosis.evidence import load_evidence
from janus_cluster.diagnosis.failure import classify
from janus_cluster.run.paths import RunDir
from janus_cluster.run.stamped import render_stamp

TRACEBACK = """\
Traceback (most recent call last):
  File "/x/janus_cluster/training/trainer.py", line 7, in step
    loss = model(batch)
torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB
"""


def stamped(text: str) -> str:
    return "".join(f"{render_stamp(1_795_269_703.0 + i)} {line}\n" for i, line in enumerate(text.splitlines()))


def test_a_failure_is_found_in_logs_whose_lines_begin_with_their_times(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "demo-1")
    run.path.mkdir()
    run.begin_attempt()
    run.begin_attempt()
    run.batch_log.write_text(
        stamped("attempt 1 of demo-1: job 7 on a\nof the first\nattempt 2 of demo-1: job 7 on a\nend")
    )
    run.rank_log(2, "a", 3).write_text(stamped(TRACEBACK))
    evidence = load_evidence(run, attempt=2, state="FAILED", exit_code=12, reason="training", nodes=["a"], secrets={})
    assert dict(evidence.logs)["batch"] == "attempt 2 of demo-1: job 7 on a\nend\n"
    (error,) = evidence.errors
    assert error.message == "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB"
    assert error.frames[-1].strip() == "loss = model(batch)"
    failure = classify(evidence)
    assert failure is not None and (failure.kind, failure.rank) == ("gpu_out_of_memory", 3)
