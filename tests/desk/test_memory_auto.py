"""training.memory: auto from desk to node: what submit writes, what resume chooses, what an attempt takes next."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from janus_cluster.desk.amend import amend
from janus_cluster.desk.resume import resume
from janus_cluster.desk.submit import Request, submit
from janus_cluster.diagnosis.card import next_steps
from janus_cluster.errors import TrainingFailed, UsageError
from janus_cluster.job.load import load_job, with_values
from janus_cluster.job.resolved import ResolvedJob
from janus_cluster.node.attempt import end_failed_training
from janus_cluster.node.local_launcher import LocalLauncher
from janus_cluster.node.memory import has_stepped, is_out_of_memory
from janus_cluster.node.phases import Attempt, StopSignals
from janus_cluster.plan.choose import DECIDED
from janus_cluster.run.current import current_bundle, follow_fallbacks, load_current
from janus_cluster.run.files import read_json
from janus_cluster.run.next_command import command_for
from janus_cluster.run.paths import RunDir
from janus_cluster.run.records.attempt import AttemptRecord, HeartbeatRecord
from janus_cluster.run.records.bundle import load_resolved
from janus_cluster.run.records.failure import FailureRecord
from tests.tiny_data import write_tiny_data

AUTO = (
    "training.memory=auto", "hardware.gpu_memory_gb=8", "hardware.processes_per_node=2", "data.image_width=644",
    "data.max_pixels=451584", "training.effective_batch_size=32",
)  # fmt: skip
# The options of such a job differ in the micro-batch.
BY_BATCH = ("deepspeed.profile=zero3", "training.gradient_checkpointing=false")
OUT_OF_MEMORY = "RuntimeError: DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."
MakeRun = Callable[..., RunDir]


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    write_tiny_data(tmp_path / "demo_data")
    return {"JANUS_HOME": str(tmp_path / "home"), "DEMO_DATA": str(tmp_path / "demo_data")}


@pytest.fixture
def make_run(tmp_path: Path, environ: dict[str, str]) -> MakeRun:
    def make(*sets: str, nodes: int = 2) -> RunDir:
        request = Request(job="demo", nodes=nodes, sets=[*AUTO, *sets], cluster="local", dry_run=True)
        return submit(request, environ=environ, cwd=tmp_path).run

    return make


def resolved_of(run: RunDir, bundle: int = 1) -> ResolvedJob:
    return load_resolved(run.bundle(bundle))


def fail(run: RunDir, *, has_done_a_step: bool, words: str = OUT_OF_MEMORY) -> tuple[int | None, Attempt]:
    """The next attempt, as a script that was submitted with bundle 1 runs it, has failed with those words."""
    choice = follow_fallbacks(run, 1)
    attempt = Attempt(run, resolved_of(run, choice.bundle), LocalLauncher(2), StopSignals(), because=choice.because)
    log = run.rank_log(attempt.number, "local-01", 0)
    log.write_text(f'Traceback (most recent call last):\n  File "x.py", line 1, in x\n    y\n{words}\n')
    run.heartbeat_json(attempt.number, 0).parent.mkdir()
    beat(run, 0, has_stepped=has_done_a_step, attempt=attempt.number)
    return end_failed_training(attempt, TrainingFailed("training ended with exit code 1")), attempt


def test_submit_writes_what_it_chose_and_keeps_what_was_given(make_run: MakeRun) -> None:
    run = make_run(*BY_BATCH)
    resolved = resolved_of(run)
    assert resolved.memory is not None
    assert resolved.memory.option.keys == {
        key: value for key, value in resolved.memory.option.keys.items() if key in DECIDED
    }
    assert resolved.job == with_values(resolved.job, resolved.memory.option.keys)
    assert resolved.effective_batch_size == 32
    assert resolved.origins["training.per_device_batch_size"] == "training.memory: auto"
    assert resolved.origins["deepspeed.profile"] == "--set"
    assert read_json(run.bundle(1).ds_config_json) == resolved.ds_config
    assert read_json(run.bundle(1).manifest_json)["memory"]["option"] == resolved.memory.option.words
    given = load_job(run.bundle(1).job_yaml, environ={}).config.training
    assert (given.memory, given.per_device_batch_size, given.gradient_accumulation_steps) == ("auto", 4, 1)


@pytest.mark.slow
def test_render_and_config_show_have_the_chosen_keys(tmp_path: Path, environ: dict[str, str]) -> None:
    def janus(*argv: str) -> subprocess.CompletedProcess[str]:
        sets = [word for text in AUTO for word in ("--set", text)]
        command = [sys.executable, "-m", "janus_cluster.cli", *argv, "demo", *sets]
        return subprocess.run(
            command, cwd=tmp_path, env=os.environ | environ, capture_output=True, text=True, check=True, timeout=600
        )

    shown = json.loads(janus("config", "show", "--json").stdout)
    assert {shown[key]["origin"] for key in DECIDED} == {"training.memory: auto"}
    rendered = json.loads(janus("render", "--part", "ds").stdout)
    assert rendered["train_micro_batch_size_per_gpu"] == shown["training.per_device_batch_size"]["value"]
    assert rendered["train_batch_size"] == 32
    output = janus("submit", "--cluster", "local", "--dry-run").stdout
    assert "planned per CPU rank" in output


def test_nothing_is_written_where_nothing_fits(make_run: MakeRun, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nothing fits into 0\.001 GB"):
        make_run("hardware.gpu_memory_gb=0.001")
    assert not (tmp_path / "home").exists()


def test_resumed_elsewhere_it_chooses_anew_and_keeps_the_effective_batch(
    make_run: MakeRun, environ: dict[str, str], tmp_path: Path
) -> None:
    run = make_run(*BY_BATCH)
    before = resolved_of(run)
    after = amend(run, before, nodes=1, sets=[], environ=environ, cwd=tmp_path)
    resolved = after.resolved
    assert resolved.memory is not None
    assert (resolved.job.nodes, resolved.effective_batch_size) == (1, 32)
    # What was typed at submission still holds.
    assert {option.keys["deepspeed.profile"] for option in resolved.memory.options} == {"zero3"}
    assert any(line.startswith("memory: zero3") for line in after.changes)
    # Submitted anew, the job file means the same batch.
    again = tmp_path / "again.yaml"
    again.write_text(after.job_yaml_text)
    training = load_job(again, environ={}).config.training
    assert training.per_device_batch_size * training.gradient_accumulation_steps * 2 == 32


def test_resumed_with_a_typed_key_it_takes_that(make_run: MakeRun, environ: dict[str, str], tmp_path: Path) -> None:
    run = make_run("deepspeed.profile=zero1")
    before = resolved_of(run)
    # The job file's own starting value, which the run does not have.
    assert before.job.training.per_device_batch_size < 4
    sets = ["training.per_device_batch_size=4"]
    resolved = amend(run, before, nodes=None, sets=sets, environ=environ, cwd=tmp_path).resolved
    assert resolved.job.training.per_device_batch_size == 4
    assert resolved.effective_batch_size == 32
    manual = amend(run, before, nodes=None, sets=["training.memory=manual"], environ=environ, cwd=tmp_path).resolved
    assert manual.memory is None
    assert manual.job.training.per_device_batch_size == before.job.training.per_device_batch_size


def test_what_ran_out_of_memory_is_not_chosen_again(make_run: MakeRun, environ: dict[str, str], tmp_path: Path) -> None:
    run = make_run(*BY_BATCH)
    assert fail(run, has_done_a_step=False)[0] is None
    smaller = load_resolved(current_bundle(run))
    assert smaller.memory is not None
    failed_gb = smaller.memory.options[0].planned_gb
    for nodes in (None, 1):
        sets = ["training.hang_timeout_s=900"]
        memory = amend(run, smaller, nodes=nodes, sets=sets, environ=environ, cwd=tmp_path).resolved.memory
        assert memory is not None
        assert memory.option.planned_gb <= 0.9 * failed_gb
        assert memory.out_of_memory_gb == failed_gb


def test_every_option_is_a_bundle_that_differs_in_what_was_decided_alone(make_run: MakeRun) -> None:
    run = make_run(*BY_BATCH)
    first = resolved_of(run)
    assert first.memory is not None
    assert run.bundle_numbers() == list(range(1, len(first.memory.options) + 1))
    assert len(first.memory.options) > 1
    for number in run.bundle_numbers()[1:]:
        resolved = resolved_of(run, number)
        assert resolved.memory is not None
        assert resolved.memory.taken == number - 1
        assert resolved.job == with_values(first.job, first.memory.options[number - 1].keys)
        assert any(resolved.memory.option.keys[key] != first.memory.option.keys[key] for key in DECIDED)
        assert read_json(run.bundle(number).ds_config_json) == resolved.ds_config
        assert resolved.effective_batch_size == first.effective_batch_size == resolved.ds_config["train_batch_size"]
        assert resolved.config_hash != first.config_hash
        assert run.bundle(number).job_yaml.read_bytes() == run.bundle(1).job_yaml.read_bytes()


def test_one_fallback_follows_the_other_and_after_the_last_the_job_has_failed(make_run: MakeRun) -> None:
    run = make_run("deepspeed.profile=zero3")
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    count = len(run.bundle_numbers())
    assert count > 2, "a second fallback"
    for number in range(1, count):
        code, attempt = fail(run, has_done_a_step=False)
        assert (code, attempt.resolved.bundle) == (None, number)
        record = read_json(run.attempt_json(number))
        assert (record["bundle"], record["fallback"]["bundle"]) == (number, number + 1)
        assert f"attempt {number} (" in record["fallback"]["because"]
        assert current_bundle(run).number == number + 1
    code, attempt = fail(run, has_done_a_step=False)
    assert (code, attempt.resolved.bundle) == (12, count)
    record = read_json(run.attempt_json(count))
    assert f"attempt {count - 1} (" in record["memory"]["because"]
    assert "the last option of training.memory: auto" in record["reason"]
    assert current_bundle(run).number == count
    assert {path: path.read_bytes() for path in before} == before, "no file of before was changed"


def test_a_requeued_script_and_a_resume_go_on_with_the_smaller_option(
    make_run: MakeRun, environ: dict[str, str], tmp_path: Path
) -> None:
    run = make_run(*BY_BATCH, "environment.python=/bin/true")
    assert fail(run, has_done_a_step=False)[0] is None
    # Slurm starts the same script, which has --bundle 1.
    attempt = fail(run, has_done_a_step=True, words="ValueError: something else")[1]
    assert attempt.resolved.bundle == 2
    assert "attempt 1 (" in read_json(run.attempt_json(2))["memory"]["because"]
    resume(run, environ=environ, cwd=tmp_path)
    sent = read_json(run.submission_json)
    assert (sent["bundle"], sent["command"]) == (2, ["bash", str(run.bundle(2).job_sbatch)])
    assert run.links.job_sbatch.readlink() == Path("bundles/2/job.sbatch")


def test_only_memory_that_was_planned_counts_as_running_out(make_run: MakeRun) -> None:
    on_cpu = resolved_of(make_run())
    hardware = on_cpu.job.hardware.model_copy(update={"device": "cuda"})
    on_gpu = on_cpu.model_copy(update={"job": on_cpu.job.model_copy(update={"hardware": hardware})})
    for kind, expected in (("gpu_out_of_memory", (True, True)), ("host_out_of_memory", (True, False))):
        failure = FailureRecord(kind=kind)  # type: ignore[arg-type]
        assert (is_out_of_memory(failure, on_cpu), is_out_of_memory(failure, on_gpu)) == expected
    assert not is_out_of_memory(FailureRecord(kind="nccl_timeout"), on_gpu)


def beat(run: RunDir, rank: int, *, has_stepped: bool, attempt: int = 1) -> None:
    HeartbeatRecord(
        rank=rank, node="a", doing="step", step=1, has_begun=True, has_stepped=has_stepped, count=1, time=1.0
    ).write(run.heartbeat_json(attempt, rank))


def test_one_rank_that_has_stepped_is_enough(make_run: MakeRun) -> None:
    run = make_run()
    assert not has_stepped(run, attempt=1, world_size=4)
    run.heartbeat_json(1, 0).parent.mkdir(parents=True)
    beat(run, 0, has_stepped=False)
    beat(run, 2, has_stepped=True)
    assert has_stepped(run, attempt=1, world_size=4)
    assert not has_stepped(run, attempt=1, world_size=2)


def test_the_card_of_a_later_lack_of_memory_names_the_next_option(make_run: MakeRun) -> None:
    run = make_run(*BY_BATCH)
    memory = resolved_of(run).memory
    assert memory is not None
    smaller = memory.next_as_options()
    assert smaller is not None
    failure = FailureRecord(kind="gpu_out_of_memory", rank=0)
    first = next_steps(failure, run=run, checkpoint=None, resolved=load_current(run))[0]
    assert first.startswith(f"{command_for('resume', run)} {smaller}   # ")


@pytest.mark.parametrize(
    ("has_done_a_step", "words", "expected"),
    [(False, OUT_OF_MEMORY, (None, 2)), (True, OUT_OF_MEMORY, (12, 1)), (False, "ValueError: something else", (12, 1))],
)
def test_only_lack_of_memory_before_the_first_step_is_followed_by_a_smaller_option(
    make_run: MakeRun, has_done_a_step: bool, words: str, expected: tuple[int | None, int]
) -> None:
    run = make_run(*BY_BATCH)
    code, _ = fail(run, has_done_a_step=has_done_a_step, words=words)
    assert (code, current_bundle(run).number) == expected
    failure = AttemptRecord.require(run.attempt_json(1)).failure
    assert failure is not None
    kind = "exception" if "ValueError" in words else "host_out_of_memory"
    assert (failure.kind, failure.rank, failure.node, failure.exit_code) == (kind, 0, "local-01", 12)
