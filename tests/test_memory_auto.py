"""training.memory: auto from desk to node: what submit writes, what resume chooses, what an attempt takes next."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from janus_cluster.amend import amend
from janus_cluster.config.load import load_job, with_values
from janus_cluster.config.schema import ResolvedJob
from janus_cluster.errors import JanusError, TrainingFailed, UsageError
from janus_cluster.local.launcher import LocalLauncher
from janus_cluster.node.attempt import end_failed_training
from janus_cluster.node.ledger import Ledger
from janus_cluster.node.memory import has_stepped, is_out_of_memory, load_settled, take_next_option, wait_until_seen
from janus_cluster.node.phases import Attempt, StopSignals
from janus_cluster.observe.card import next_steps
from janus_cluster.observe.failure import Failure
from janus_cluster.plan.choose import DECIDED
from janus_cluster.rundir import RunDir, read_json, write_json_atomically
from janus_cluster.submit import Request, submit

AUTO = (
    "training.memory=auto", "hardware.gpu_memory_gb=8", "hardware.processes_per_node=2", "data.image_width=644",
    "data.max_pixels=451584", "training.effective_batch_size=32",
)  # fmt: skip
# The options of such a job differ in the micro-batch.
BY_BATCH = ("deepspeed.profile=zero3", "training.gradient_checkpointing=false")
MakeRun = Callable[..., RunDir]


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "demo_data" / "episode").mkdir(parents=True)
    return {"JANUS_HOME": str(tmp_path / "home"), "DEMO_DATA": str(tmp_path / "demo_data")}


@pytest.fixture
def make_run(tmp_path: Path, environ: dict[str, str]) -> MakeRun:
    def make(*sets: str, nodes: int = 2) -> RunDir:
        request = Request(job="demo", nodes=nodes, sets=[*AUTO, *sets], cluster="local", dry_run=True)
        return submit(request, environ=environ, cwd=tmp_path).run

    return make


def resolved_of(run: RunDir) -> ResolvedJob:
    return ResolvedJob.load(run.resolved_json.read_text(encoding="utf-8"))


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
    assert read_json(run.ds_config_json) == resolved.ds_config == resolved.memory.option.ds_config
    assert read_json(run.manifest_json)["memory"]["option"] == resolved.memory.option.words
    given = load_job(run.job_yaml, environ={}).config.training
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
    said = janus("submit", "--cluster", "local", "--dry-run").stdout
    assert "planned per CPU rank" in said


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
    smaller = take_next_option(run, resolved_of(run), because="attempt 1 ran out of memory")
    assert smaller.memory is not None
    failed_gb = smaller.memory.options[0].planned_gb
    for nodes in (None, 1):
        sets = ["training.hang_timeout_s=900"]
        memory = amend(run, smaller, nodes=nodes, sets=sets, environ=environ, cwd=tmp_path).resolved.memory
        assert memory is not None
        assert memory.option.planned_gb <= 0.9 * failed_gb
        assert memory.out_of_memory_gb == failed_gb


def test_the_next_option_is_in_every_file_and_the_one_before_it_in_the_history(make_run: MakeRun) -> None:
    run = make_run(*BY_BATCH)
    before = resolved_of(run)
    assert before.memory is not None
    after = take_next_option(run, before, because="attempt 1 ran out of memory")
    assert resolved_of(run) == after
    assert after.memory is not None
    assert (after.memory.taken, after.memory.because) == (1, "attempt 1 ran out of memory")
    assert after.config_hash != before.config_hash
    assert read_json(run.ds_config_json) == before.memory.options[1].ds_config
    changed = {key for key in DECIDED if after.memory.option.keys[key] != before.memory.option.keys[key]}
    assert changed
    assert after.job.data == before.job.data
    assert after.effective_batch_size == before.effective_batch_size == after.ds_config["train_batch_size"]
    kept = RunDir(run.history / "1")
    assert resolved_of(kept) == before
    assert kept.ds_config_json.is_file()
    assert {path.stat().st_mode & 0o777 for path in (run.resolved_json, run.ds_config_json)} == {0o600}
    while after.memory is not None and after.memory.next_option is not None:
        after = take_next_option(run, after, because="again")
    with pytest.raises(ValueError, match="no smaller option"):
        take_next_option(run, after, because="again")


def test_a_node_that_went_down_between_two_writes_leaves_nothing_that_disagrees(make_run: MakeRun) -> None:
    run = make_run(*BY_BATCH)
    old = read_json(run.ds_config_json)
    take_next_option(run, resolved_of(run), because="attempt 1 ran out of memory")
    write_json_atomically(run.ds_config_json, old)
    settled = load_settled(run)
    assert read_json(run.ds_config_json) == settled.ds_config != old


def test_a_node_waits_until_it_sees_what_the_attempt_means(make_run: MakeRun) -> None:
    run = make_run(*BY_BATCH)
    before = resolved_of(run)
    assert wait_until_seen(run, config_hash=before.config_hash) == before
    assert wait_until_seen(run, config_hash=None) == before
    with pytest.raises(JanusError, match="the attempt means 0123"):
        wait_until_seen(run, config_hash="0123", limit_s=0.0)
    old = read_json(run.ds_config_json)
    after = take_next_option(run, before, because="attempt 1 ran out of memory")
    write_json_atomically(run.ds_config_json, old)
    with pytest.raises(JanusError):
        wait_until_seen(run, config_hash=after.config_hash, limit_s=0.0)


def test_attempts_with_other_options_are_not_counted_as_getting_nowhere(make_run: MakeRun) -> None:
    run = make_run("deepspeed.profile=zero3")
    resolved = resolved_of(run)
    counts = []
    while resolved.memory is not None and resolved.memory.next_option is not None:
        ledger = Ledger(run, attempt=run.begin_attempt(), job_id="1", nodes=["n"], memory=resolved.memory)
        counts.append(ledger.earlier_without_progress().count)
        ledger.end("FAILED", 12, "out of memory")
        resolved = take_next_option(run, resolved, because="again")
    same = Ledger(run, attempt=run.begin_attempt(), job_id="1", nodes=["n"], memory=resolved.memory)
    same.end("FAILED", 12, "killed")
    again = Ledger(run, attempt=run.begin_attempt(), job_id="1", nodes=["n"], memory=resolved.memory)
    assert len(counts) > 1
    assert (set(counts), again.earlier_without_progress().count) == ({0}, 1)


def test_only_memory_that_was_planned_counts_as_running_out(make_run: MakeRun) -> None:
    on_cpu = resolved_of(make_run())
    hardware = on_cpu.job.hardware.model_copy(update={"device": "cuda"})
    on_gpu = on_cpu.model_copy(update={"job": on_cpu.job.model_copy(update={"hardware": hardware})})
    for kind, expected in (("gpu_out_of_memory", (True, True)), ("host_out_of_memory", (True, False))):
        failure = Failure(kind=kind)  # type: ignore[arg-type]
        assert (is_out_of_memory(failure, on_cpu), is_out_of_memory(failure, on_gpu)) == expected
    assert not is_out_of_memory(Failure(kind="nccl_timeout"), on_gpu)


def test_one_rank_that_has_stepped_is_enough(make_run: MakeRun) -> None:
    run = make_run()
    assert not has_stepped(run, attempt=1, world_size=4)
    for rank, value in ((0, {"step": 0}), (2, {"step": 1, "has_stepped": True})):
        run.heartbeat_json(1, rank).parent.mkdir(parents=True, exist_ok=True)
        write_json_atomically(run.heartbeat_json(1, rank), value)
    assert has_stepped(run, attempt=1, world_size=4)
    assert not has_stepped(run, attempt=1, world_size=2)


def test_the_card_of_a_later_lack_of_memory_names_the_next_option(make_run: MakeRun) -> None:
    run = make_run(*BY_BATCH)
    memory = resolved_of(run).memory
    assert memory is not None
    smaller = memory.next_as_options()
    assert smaller is not None
    failure = Failure(kind="gpu_out_of_memory", rank=0)
    first = next_steps(failure, run=run, ref="7", checkpoint=None, job={}, smaller=smaller)[0]
    assert first.startswith("janus-cluster resume 7 --set training.")


@pytest.mark.parametrize(
    ("has_done_a_step", "words", "expected"),
    [
        (False, "RuntimeError: DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes.", (None, 1)),
        (True, "RuntimeError: DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes.", (12, 0)),
        (False, "ValueError: something else", (12, 0)),
    ],
)
def test_only_lack_of_memory_before_the_first_step_is_followed_by_a_smaller_option(
    make_run: MakeRun, has_done_a_step: bool, words: str, expected: tuple[int | None, int]
) -> None:
    run = make_run(*BY_BATCH)
    attempt = Attempt(run, load_settled(run), LocalLauncher(2), StopSignals())
    log = run.rank_log(attempt.number, "local-01", 0)
    log.write_text(f'Traceback (most recent call last):\n  File "x.py", line 1, in x\n    y\n{words}\n')
    run.heartbeat_json(1, 0).parent.mkdir()
    write_json_atomically(run.heartbeat_json(1, 0), {"has_stepped": has_done_a_step})
    code = end_failed_training(attempt, TrainingFailed("training ended with exit code 1"))
    memory = resolved_of(run).memory
    assert memory is not None
    assert (code, memory.taken) == expected
