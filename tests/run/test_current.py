"""Which bundle a run is at, from what its submission and its attempts recorded."""

from __future__ import annotations

from pathlib import Path

import pytest

from janus_cluster.errors import UsageError
from janus_cluster.run.current import BundleChoice, current_bundle, follow_fallbacks, require_bundles
from janus_cluster.run.paths import RunDir
from janus_cluster.run.records.attempt import AttemptRecord, FallbackRecord
from janus_cluster.run.records.submission import SubmissionRecord


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    found = RunDir(tmp_path / "run")
    found.bundle(1).path.mkdir(parents=True)
    return found


def attempt(run: RunDir, bundle: int, *, fallback: int | None = None) -> None:
    number = run.begin_attempt()
    following = None
    if fallback is not None:
        following = FallbackRecord(bundle=fallback, because=f"attempt {number} ran out of memory")
    AttemptRecord(attempt=number, bundle=bundle, fallback=following, from_step=0, started_at=1.0, state="FAILED").write(
        run.attempt_json(number)
    )


def submit(run: RunDir, bundle: int) -> None:
    attempts_before = max(run.attempts(), default=0)
    sent = SubmissionRecord(cluster="slurm", bundle=bundle, attempts_before=attempts_before, job_id="1")
    sent.write(run.submission_json)


def test_a_run_is_at_the_bundle_that_was_submitted_until_an_attempt_fell_back(run: RunDir) -> None:
    assert current_bundle(run).number == 1
    submit(run, 1)
    assert current_bundle(run).number == 1
    attempt(run, 1, fallback=2)
    assert current_bundle(run).number == 2
    attempt(run, 2)
    assert current_bundle(run).number == 2


def test_a_new_submission_counts_until_its_own_first_attempt(run: RunDir) -> None:
    submit(run, 1)
    attempt(run, 1, fallback=2)
    # The same job id again: a new sandbox counts from 1.
    submit(run, 4)
    assert current_bundle(run).number == 4
    attempt(run, 4, fallback=5)
    assert current_bundle(run).number == 5


def test_a_script_that_was_submitted_by_hand_counts_too(run: RunDir) -> None:
    attempt(run, 2)
    assert current_bundle(run).number == 2
    submit(run, 3)
    attempt(run, 3)
    attempt(run, 1)
    assert current_bundle(run).number == 1


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"bundle": "1", "fallback": 3}', '{"bundle": true}'])
def test_an_attempt_whose_record_is_damaged_is_passed_over(run: RunDir, text: str) -> None:
    submit(run, 1)
    attempt(run, 1, fallback=2)
    run.attempt_json(run.begin_attempt()).write_text(text)
    assert current_bundle(run).number == 2
    assert follow_fallbacks(run, 1) == BundleChoice(2, "attempt 1 ran out of memory")
    run.begin_attempt()
    assert current_bundle(run).number == 2


def test_a_requeued_script_follows_the_chain_as_far_as_it_was_recorded(run: RunDir) -> None:
    assert follow_fallbacks(run, 1) == BundleChoice(1)
    attempt(run, 1, fallback=2)
    attempt(run, 2)
    assert follow_fallbacks(run, 1) == BundleChoice(2, "attempt 1 ran out of memory")
    attempt(run, 2, fallback=3)
    assert follow_fallbacks(run, 1) == BundleChoice(3, "attempt 3 ran out of memory")
    assert follow_fallbacks(run, 2) == BundleChoice(3, "attempt 3 ran out of memory")
    assert follow_fallbacks(run, 3) == BundleChoice(3, "attempt 3 ran out of memory"), "submitted by resume"
    assert follow_fallbacks(run, 4) == BundleChoice(4), "of another submission"
    attempt(run, 3, fallback=1)
    assert follow_fallbacks(run, 1).bundle == 3, "a record that leads back is damaged"


def test_a_run_folder_without_bundles_is_refused_with_what_to_do(tmp_path: Path, run: RunDir) -> None:
    require_bundles(run)
    with pytest.raises(UsageError, match=r"made by janus-cluster 0\.1") as refused:
        require_bundles(RunDir(tmp_path / "old"))
    assert f"janus-cluster submit {tmp_path / 'old' / 'job.yaml'}" in (refused.value.hint or "")
