"""What is read from a run folder, damaged ones too, and the figures of it."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
from run_files import append_metric_line, write_verdict

from janus_cluster.report.drawing import MIN_SMOOTHED
from janus_cluster.report.history import load_history
from janus_cluster.report.page import render_page
from janus_cluster.report.summary import compare_settings, comparison_to_json, summarize
from janus_cluster.report.table import Table
from janus_cluster.run.files import read_json, write_json_atomically
from janus_cluster.run.records.training import Measure, NavigationScores, SimulationRecord
from janus_cluster.run.text import to_json


def test_a_run_is_summed_up_without_the_steps_that_warm_up(make_run) -> None:
    summary = summarize(load_history(make_run()))
    assert (summary.steps, summary.total_steps, summary.loss, summary.loss_last_10) == (6, 6, 4.0, 6.5)
    assert (summary.step_time_s, summary.samples_per_s) == (2.5, 4.0)
    assert (summary.attempts, summary.nodes, summary.state) == (2, 2, "COMPLETED")
    assert (summary.action_accuracy, summary.majority_accuracy) == (0.6, 0.4)


def test_a_loss_that_is_no_number_is_not_passed_over_for_an_earlier_one(make_run) -> None:
    run = make_run()
    append_metric_line(run, {"kind": "train", "time": 1131.0, "attempt": 2, "step": 7, "loss": float("nan")})
    history = load_history(run)
    assert math.isnan(summarize(history).loss or 0.0)
    assert history.notes == ["the loss is no finite number from step 7 on, 1 times"]
    assert json.loads(to_json(comparison_to_json(history, history)))["runs"][0]["loss"] is None


def test_events_of_metrics_and_gate_stand_in_the_order_of_time(make_run) -> None:
    assert [e.kind for e in load_history(make_run()).events] == ["gate", "checkpoint", "stop", "gate"]


def test_a_failed_gate_shows_its_causes(make_run) -> None:
    run = make_run()
    write_verdict(run, 2, [("n2", "gpu.count", "FAIL", "7 of 8 GPUs")], created_at=1105.0)
    assert load_history(run).events[-1].text == "FAIL: gpu.count on n2: 7 of 8 GPUs"


def test_damaged_lines_change_no_figure(make_run) -> None:
    run = make_run()
    before = summarize(load_history(run))
    with run.metrics_jsonl.open("ab") as f:
        f.write(b'{"kind": "train", "step": \n3\n[1]\nnull\n\xff\xfe\n{"kind": ["train"]}\n{"kind": "train", "step"')
    history = load_history(run)
    assert summarize(history) == before
    assert any("6 lines" in note for note in history.notes)


def test_values_of_a_wrong_kind_are_gaps_and_no_error(make_run) -> None:
    run = make_run()
    bad = {"kind": "train", "step": 7, "loss": "nan?", "step_time_s": True, "samples_per_s": None, "ranks": [1],
           "loss_segments": 3, "attempt": {}}  # fmt: skip
    with run.metrics_jsonl.open("a") as f:
        f.write(json.dumps(bad) + "\n" + '{"kind": "train", "step": 8, "ranks": {"data_wait_s": ["x"]}}\n')
        f.write(f'{{"kind": "train", "step": 9, "loss": {10**400}}}\n')
    steps = load_history(run).steps
    assert all(math.isnan(v) for v in steps.column("loss")[-3:])
    assert summarize(load_history(run)).loss == 4.0


def test_a_folder_with_broken_files_has_an_empty_history(make_run) -> None:
    run = make_run()
    for path in (run.bundle(1).resolved_json, run.status_json, run.attempt_json(1), run.verdict_json(1)):
        path.write_bytes(b"\xff{")
    run.attempt_json(2).write_text("[]")
    run.metrics_jsonl.unlink()
    history = load_history(run)
    assert (len(history.steps), list(history.attempts), dict(history.settings)) == (0, [], {})


def test_a_failed_attempt_shows_the_failure_that_the_node_stored(make_run) -> None:
    run = make_run()
    failure = {"kind": "diverged", "rank": 3, "node": "n2", "message": "the loss is not finite"}
    value = read_json(run.attempt_json(1)) | {"state": "FAILED", "reason": "exit code 1", "failure": failure}
    write_json_atomically(run.attempt_json(1), value)
    assert load_history(run).attempts[0].reason == (
        "the loss is no number any more: rank 3 on n2: the loss is not finite"
    )


def test_an_attempt_that_another_one_followed_does_not_run(make_run) -> None:
    run = make_run()
    value = read_json(run.attempt_json(1)) | {"ended_at": None, "state": "RUNNING"}
    write_json_atomically(run.attempt_json(1), value)
    first, second = load_history(run).attempts
    assert (first.state, first.reason) == ("KILLED", "killed before it recorded a reason")
    assert second.state == "COMPLETED"


def test_two_runs_differ_in_what_was_set(make_run) -> None:
    a, b = load_history(make_run("a-1-1")), load_history(make_run("b-1-1", seed=7, tune="all"))
    assert [(d.key, d.a, d.b) for d in compare_settings(a, b)] == [
        ("training.seed", "0", "7"),
        ("training.tune", None, "all"),
    ]
    value = comparison_to_json(a, b)
    assert [r["name"] for r in value["runs"]] == ["a-1-1", "b-1-1"]
    assert json.dumps(value, allow_nan=False)


def test_no_secret_is_shown_and_text_is_escaped(make_run) -> None:
    run = make_run()
    value = read_json(run.bundle(1).resolved_json)
    value["job"]["environment"]["variables"] = {"HF_TOKEN": "hf_plainvalue", "PROXY": "http://me:hunter22@proxy"}
    value["job"]["slurm"] = {"comment": "<script>alert(1)</script>"}
    value["origins"] |= {"environment.variables": "job.yaml:9", "slurm.comment": "job.yaml:3"}
    write_json_atomically(run.bundle(1).resolved_json, value)
    run.bundle(1).secrets_env.write_text("export WANDB_API_KEY=sekret-123456\n")
    append_metric_line(run, {"kind": "checkpoint_broken", "time": 1066.0, "attempt": 1, "step": 3, "path": "/c",
                       "reason": "sekret-123456 \x1b[31m<b>"})  # fmt: skip
    page = render_page([load_history(run)], [], made_at=0.0)
    for secret in ("hf_plainvalue", "hunter22", "sekret-123456", "<script>", "\x1b", "<b>"):
        assert secret not in page
    for shown in ("&lt;HF_TOKEN&gt;", "&lt;WANDB_API_KEY&gt;", "&lt;script&gt;", "job.yaml:9", "broken checkpoint"):
        assert shown in page


def test_a_start_is_an_event_with_its_longest_parts(make_run) -> None:
    run = make_run()
    seconds = {"launch": 2.0, "imports": 4.5, "process_group": 0.1, "weights": 31.25}
    append_metric_line(
        run, {"kind": "start", "time": 1044.0, "attempt": 1, "step": 1, "total_s": 37.85, "seconds": seconds}
    )
    (event,) = [e for e in load_history(run).events if e.kind == "start"]
    assert event.text == "37.9 s after its processes began (weights 31.2, imports 4.5, launch 2.0)"
    assert "first step" in render_page([load_history(run)], [], made_at=0.0)


def test_the_page_asks_no_other_place_for_anything(make_run) -> None:
    page = render_page([load_history(make_run("a-1-1")), load_history(make_run("b-1-1"))], [], made_at=0.0)
    for word in ('src="http', "href=", "<script", "@import", "url("):
        assert word not in page
    assert "default-src 'none'" in page


@pytest.mark.parametrize("num_rows", [10, 11, 1000, 12345])
def test_a_table_stays_small_and_keeps_its_rows_evenly(num_rows: int) -> None:
    table = Table(max_rows=10)
    for i in range(num_rows):
        table.add({"step": float(i)} | ({"late": 1.0} if i > 5 else {}))
    assert len(table) <= 10
    steps = list(table.column("step"))
    assert steps == [float(i * table.stride) for i in range(len(steps))]
    assert len(table.column("late")) == len(table.column("never")) == len(table)


def test_pale_lines_are_explained_only_where_there_are_some(make_run) -> None:
    history = load_history(make_run())
    assert "Pale lines" not in render_page([history], [], made_at=1.0)
    steps = Table()
    for step in range(MIN_SMOOTHED):
        steps.add({"attempt": 1.0, "step": float(step), "loss": 1.0})
    assert "Pale lines" in render_page([replace(history, steps=steps)], [], made_at=1.0)


def test_the_last_step_counts_where_it_was_not_logged(make_run) -> None:
    run = make_run()
    assert summarize(load_history(run)).steps == 6
    append_metric_line(run, {"kind": "complete", "time": 1190.0, "attempt": 2, "step": 8, "total_steps": 8})
    assert summarize(load_history(run)).steps == 8
    append_metric_line(run, {"kind": "checkpoint", "time": 1.0, "attempt": 1, "step": 9, "path": "/c/checkpoint-9"})
    assert summarize(load_history(run)).steps == 8, "of an earlier attempt"


def test_the_score_of_a_simulation_is_shown_with_its_interval(make_run) -> None:
    run = make_run()
    one = Measure(mean=1.0, low=0.9, high=1.0)
    scores = NavigationScores(
        num_episodes=100,
        success_rate=Measure(mean=0.23, low=0.158, high=0.322),
        spl=Measure(mean=0.193, low=0.121, high=0.264),
        oracle_success_rate=one, navigation_error_m=one, path_m=one, steps=one, num_never_stopped=3,
    )  # fmt: skip
    world = {"level": "easy", "seed": 1}
    begun = SimulationRecord(policy={}, world=world, num_episodes=100)
    run.simulation.mkdir()
    begun.write(run.simulation / "simulation.json")
    assert summarize(load_history(run)).success_rate is None, "it has not reached its end"
    replace(begun, scores=scores, references={"random": scores}).write(run.simulation / "simulation.json")
    history = load_history(run)
    assert (summarize(history).success_rate, summarize(history).spl) == (0.23, 0.193)
    page = render_page([history], [], made_at=1.0)
    assert "success rate 0.230 (95 %: 0.158 to 0.322), SPL 0.193 (95 %: 0.121 to 0.264)" in page
    assert "random 0.230" in page and "level easy, seed 1" in page
    (run.simulation / "simulation.json").write_text('{"scores": {"spl": 7}}')
    assert summarize(load_history(run)).spl is None


def test_a_dotted_key_is_broken_after_its_dots_only(make_run) -> None:
    page = render_page([load_history(make_run(max_steps=7))], [], made_at=1.0)
    assert '<td class="key">training.<wbr>max_steps</td>' in page
    assert ".key { overflow-wrap: break-word; }" in page
    assert "{#" not in page
