from __future__ import annotations

from pathlib import Path

from janus_cluster.diagnosis.card import next_steps
from janus_cluster.diagnosis.evidence import Evidence
from janus_cluster.diagnosis.failure import classify
from janus_cluster.run.paths import RunDir
from janus_cluster.run.records.bundle import ResolvedRecord
from janus_cluster.run.records.failure import ScriptFailure


def test_after_a_failed_setup_the_correction_is_first_and_resume_carries_it() -> None:
    message = "environment.setup: exit code 127 of: module load cuda"
    evidence = Evidence(state="FAILED", exit_code=2, script=ScriptFailure(job_id="7", node="n1", message=message))
    failure = classify(evidence)
    assert failure is not None and failure.kind == "environment"
    steps = next_steps(failure, run=RunDir(Path("/r")), checkpoint=None, resolved=ResolvedRecord())
    assert "source /etc/profile.d/modules.sh" in steps[0]
    assert steps[-1].startswith("janus-cluster resume /r --set 'environment.setup=[…]'")
    assert not any(step.startswith("janus-cluster resume /r  ") for step in steps)
