"""What an answer of sbatch proves, for answers of real sites."""

from __future__ import annotations

import pytest

from janus_cluster.slurm.sbatch_answer import Queued, Refusal, SbatchAnswer, read_answer

FAILED = "sbatch: error: Batch job submission failed: "


@pytest.mark.parametrize(
    ("stdout", "returncode", "queued"),
    [
        ("Submitted batch job 7\n", 0, Queued("7")),
        ("Submitted batch job 7\n", 1, Queued("7")),
        ("Submitted batch job 7 on cluster beta\n", 0, Queued("7", "beta")),
        ("Hello. Your last job 3 used 1 h.\nSubmitted batch job 7\nBye\n", 0, Queued("7")),
        ("15786755\n", 0, Queued("15786755")),
        ("note\n15786755;beta\n", 0, Queued("15786755", "beta")),
        ("15786755\n", 1, None),
        ("Submitted batch job \ufffd\n", 0, None),
        ("", 0, None),
        ("3 jobs are waiting\n", 0, None),
    ],
)
def test_a_job_id_is_read_from_every_form_that_sbatch_has(stdout: str, returncode: int, queued: Queued | None) -> None:
    assert read_answer(SbatchAnswer(returncode, stdout, "")) == queued


@pytest.mark.parametrize(
    ("stderr", "kind"),
    [
        (FAILED + "Invalid account or account/partition combination specified", "wrong"),
        ("sbatch: error: invalid partition specified: gold", "wrong"),
        ("sbatch: unrecognized option '--gold'\nTry \"sbatch --help\"", "wrong"),
        (FAILED + "Unspecified error", "wrong"),
        ("sbatch: error: QOSMaxNodePerJobLimit\n" + FAILED + "Job violates accounting/QOS policy (…)", "wrong"),
        (FAILED + "Slurm temporarily unable to accept job, sleeping and retrying", "away"),
        ("sbatch: error: QOSMaxSubmitJobPerUserLimit\n" + FAILED + "Job violates accounting/QOS policy (…)", "limit"),
        ("sbatch: error: AssocMaxSubmitJobLimit\n" + FAILED + "Job violates accounting/QOS policy", "limit"),
        (FAILED + "Unable to contact slurm controller (connect failure)", "away"),
        ("sbatch: fatal: Could not establish a configuration source", "away"),
        (FAILED + "Protocol authentication error", "away"),
        (FAILED + "Slurm backup controller in standby mode", "away"),
    ],
)
def test_a_refusal_has_its_kind(stderr: str, kind: str) -> None:
    refusal = read_answer(SbatchAnswer(1, "", stderr))
    assert isinstance(refusal, Refusal) and refusal.kind == kind


@pytest.mark.parametrize(
    ("stderr", "returncode"),
    [
        (FAILED + "Socket timed out on send/recv operation", 1),
        (FAILED + "Zero Bytes were transmitted or received", 1),
        (FAILED + "Transport endpoint is not connected", 1),
        (FAILED + "Unexpected message received", 1),
        (FAILED + "Unable to contact slurm controller (send failure)", 1),
        ("sbatch: error: invalid account", -9),
        ("wrapper: something broke", 1),
        ("", 1),
        ("", 137),
    ],
)
def test_what_proves_neither_is_neither(stderr: str, returncode: int) -> None:
    assert read_answer(SbatchAnswer(returncode, "", stderr)) is None
