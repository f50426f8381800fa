from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from run_files import append_metric_line

from janus_cluster.node.status import StatusWriter
from janus_cluster.observe.listing import render_list
from janus_cluster.observe.progress import TAIL_BYTES, Progress, build_progress, load_progress
from janus_cluster.observe.status import RunStatus, add_card, add_slow, collect_status, load_earlier, next_commands
from janus_cluster.observe.status_view import describe_balance, render_status
from janus_cluster.run.files import write_json_atomically
from janus_cluster.run.paths import RunDir
from janus_cluster.run.records.attempt import AttemptRecord
from janus_cluster.run.records.health import GpuSample, HealthSample
from janus_cluster.run.records.metrics import CheckpointEvent, TrainEvent, parse_events
from janus_cluster.run.records.verdict import CheckResult, Verdict
from janus_cluster.slurm.state import NO_SOURCE, JobState

CONTRACT = [
    *("job_id", "name", "state", "source", "age_s", "attempt", "nodes"),
    *("step", "total_steps", "exit_code", "reason", "run_dir", "kind"),
    *("loss", "step_time_s", "median_step_time_s", "plan_step_time_s", "samples_per_s", "eta_s"),
    *("action_accuracy", "majority_accuracy", "checkpoint", "export", "ranks"),
    *("slow", "earlier", "failed_checks", "exclude", "retry", "card", "next"),
]


def make_run(folder: Path) -> tuple[RunDir, StatusWriter]:
    run = RunDir(folder / "demo-20261121-aaaa")
    run.path.mkdir(parents=True)
    attempt = run.begin_attempt()
    sent = {"schema_version": 1, "cluster": "local", "job_id": "local-999999999", "submitted_at": time.time() - 1}
    write_json_atomically(run.submission_json, sent | {"slurm_conf": None, "command": []})
    nodes = ["h800-01", "h800-02"]
    return run, StatusWriter(run, cluster="local", job_id="local-999999999", attempt=attempt, nodes=nodes)


def train(run: RunDir, steps: Sequence[int], **changes: Any) -> None:
    for step in steps:
        record = {"kind": "train", "time": 1.0, "attempt": 1, "step": step, "total_steps": 40, "loss": 2.5 / step}
        append_metric_line(run, record | {"step_time_s": 3.0, "samples_per_s": 5.25, "learning_rate": 1e-5} | changes)


def shown(statuses: Sequence[RunStatus]) -> str:
    console = Console(width=220, color_system=None)
    with console.capture() as capture:
        console.print(render_status(statuses))
    return capture.get()


def test_json_has_exactly_the_keys_of_the_contract(tmp_path: Path) -> None:
    run, writer = make_run(tmp_path)
    train(run, [1, 2, 3])
    writer.finish("COMPLETED", 0)
    value = collect_status([run])[0].to_json()
    assert list(value) == CONTRACT
    assert json.loads(json.dumps(value)) == {
        "job_id": "local-999999999",
        "name": "demo-20261121-aaaa",
        "state": "COMPLETED",
        "source": "status.json",
        "age_s": value["age_s"],
        "attempt": 1,
        "nodes": ["h800-01", "h800-02"],
        "step": 3,
        "total_steps": 40,
        "exit_code": 0,
        "reason": None,
        "run_dir": str(run.path),
        "kind": "train",
        "loss": 2.5 / 3,
        "step_time_s": 3.0,
        "median_step_time_s": 3.0,
        "plan_step_time_s": None,
        "samples_per_s": 5.25,
        "eta_s": None,
        "action_accuracy": None,
        "majority_accuracy": None,
        "checkpoint": None,
        "export": None,
        "ranks": [],
        "slow": [],
        "earlier": [],
        "failed_checks": [],
        "exclude": [],
        "retry": None,
        "card": None,
        "next": value["next"],
    }
    assert 0 <= value["age_s"] < 60


def test_running_attempt_whose_process_is_gone_has_failed(tmp_path: Path) -> None:
    run, _ = make_run(tmp_path)
    value = collect_status([run])[0].to_json()
    assert (value["state"], value["source"]) == ("FAILED", "process")


def test_failed_gate_names_node_check_measurement_fix_and_next_command(tmp_path: Path) -> None:
    run, writer = make_run(tmp_path)
    checks = (
        CheckResult(id="paths.model", phase="static", node="h800-01", state="PASS", measured="there", expected="there"),
        CheckResult(
            id="paths.model",
            phase="static",
            node="h800-02",
            state="FAIL",
            measured="missing [ /models/x ]",
            expected="a folder",
            fix="mount /models on h800-02",
        ),
    )
    verdict = Verdict(
        state="FAIL", job_id="1", config_hash="x", nodes=("h800-01", "h800-02"), created_at=time.time(), results=checks
    )
    write_json_atomically(run.verdict_json(1), verdict.to_json())
    writer.finish("FAILED", 10, reason="preflight FAIL: h800-02 paths.model (missing)")
    text = shown(collect_status([run]))
    assert "FAIL paths.model on h800-02: missing [ /models/x ] (expected: a folder)" in text
    assert "fix: mount /models on h800-02" in text
    assert f"janus-cluster resume {run.path} --set slurm.exclude=h800-02" in text
    assert "paths.model on h800-01" not in text


def test_nodes_that_all_failed_are_not_to_be_excluded(tmp_path: Path) -> None:
    run, writer = make_run(tmp_path)
    checks = tuple(
        CheckResult(id="paths.model", phase="static", node=node, state="FAIL", measured="missing", expected="there")
        for node in ("h800-01", "h800-02")
    )
    verdict = Verdict(
        state="FAIL", job_id="1", config_hash="x", nodes=("h800-01", "h800-02"), created_at=time.time(), results=checks
    )
    write_json_atomically(run.verdict_json(1), verdict.to_json())
    writer.finish("FAILED", 10, reason="preflight FAIL")
    text = shown(collect_status([run]))
    assert "exclude" not in text
    assert "FAIL paths.model on h800-01, h800-02: missing (expected: there)" in text
    (with_card,) = [shown([add_card(status)]) for status in collect_status([run])]
    assert with_card.count("paths.model") == 1, "shown once, in the card"
    assert with_card.index("failed:") < with_card.index("paths.model") < with_card.index("next:")


def test_gate_without_a_verdict_file_still_shows_its_reason(tmp_path: Path) -> None:
    run, writer = make_run(tmp_path)
    writer.finish("FAILED", 11, reason="h800-02 did not report")
    assert "h800-02 did not report" in shown(collect_status([run]))


def test_finished_run_shows_accuracy_checkpoint_and_export(tmp_path: Path) -> None:
    run, writer = make_run(tmp_path)
    train(run, range(1, 41))
    append_metric_line(run, {"kind": "checkpoint", "step": 40, "path": "/runs/x/checkpoints/checkpoint-40"})
    append_metric_line(run, {"kind": "eval", "step": 40, "action_accuracy": 0.75, "majority_accuracy": 0.5})
    append_metric_line(run, {"kind": "export", "step": 40, "path": "/runs/x/export"})
    writer.finish("COMPLETED", 0)
    text = shown(collect_status([run]))
    assert "held-out action accuracy: 0.750 (majority class 0.500)" in text
    assert "/runs/x/checkpoints/checkpoint-40" in text
    assert "exported model: /runs/x/export" in text
    assert "40/40" in text


def test_a_run_that_was_moved_names_its_checkpoint_where_it_is_now(tmp_path: Path) -> None:
    run, _ = make_run(tmp_path)
    (run.checkpoints / "checkpoint-40").mkdir(parents=True)
    for kind, place in (("checkpoint", "/old/place/checkpoints/checkpoint-40"), ("export", "/old/place/export")):
        append_metric_line(run, {"kind": kind, "time": 1.0, "attempt": 1, "step": 40, "path": place})
    assert load_progress(run).checkpoint == str(run.checkpoints / "checkpoint-40")
    assert load_progress(run).export == "/old/place/export", "what is in neither place is shown as recorded"


def test_progress_is_read_from_the_end_of_a_long_file(tmp_path: Path) -> None:
    run, _ = make_run(tmp_path)
    train(run, [1], note="x" * TAIL_BYTES)
    train(run, [2, 4], step_time_s=10.0)
    progress = load_progress(run)
    assert (progress.step, progress.total_steps, progress.step_time_s) == (4, 40, 10.0)
    assert progress.eta_s == pytest.approx(360.0)


def test_torn_and_foreign_lines_are_left_out(tmp_path: Path) -> None:
    run, _ = make_run(tmp_path)
    train(run, [5])
    with run.metrics_jsonl.open("ab") as f:
        f.write(b'\xff\xfe\n[1]\n{"kind": "train", "step": "six"}\n{"kind": "train", "step": 7')
    progress = load_progress(run)
    assert progress.step is None
    assert progress.eta_s is None


def test_no_metrics_is_no_progress(tmp_path: Path) -> None:
    run, _ = make_run(tmp_path)
    assert load_progress(run).step is None


def test_dry_run_shows_how_to_submit_it(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "导航 1")
    run.path.mkdir()
    statuses = collect_status([run])
    assert statuses[0].to_json()["state"] == "NOT_SUBMITTED"
    assert shown(statuses).count(f"sbatch '{run.links.job_sbatch}'") == 1
    run.bundle(1).path.mkdir(parents=True)
    write_json_atomically(run.bundle(1).resolved_json, {"cluster": "local"})
    assert f"next: JANUS_LAUNCHER=local bash '{run.links.job_sbatch}'" in shown(statuses), "there may be no Slurm here"


def test_every_next_command_is_one_that_a_shell_takes_as_it_is_copied(tmp_path: Path) -> None:
    folder = tmp_path / "我的 实验"
    gated, writer = make_run(folder / "a")
    check = CheckResult(id="x", phase="static", node="h800-02", state="FAIL", measured="1", expected="2")
    verdict = Verdict(
        state="FAIL", job_id="1", config_hash="x", nodes=("h800-01", "h800-02"), created_at=0.0, results=(check,)
    )
    write_json_atomically(gated.verdict_json(1), verdict.to_json())
    writer.finish("FAILED", 10, reason="preflight FAIL")
    done, writer = make_run(folder / "b")
    writer.finish("COMPLETED", 0)
    failed, writer = make_run(folder / "c")
    writer.finish("FAILED", 12, reason="[Errno 28] No space left on device")
    text = shown([add_card(s) for s in collect_status([gated, done, failed])])
    commands = [line.split("next: ")[1] for line in text.splitlines() if "next: " in line]
    assert len(commands) == 6, text
    for command in commands:
        assert subprocess.run(["bash", "-n", "-c", command], check=False).returncode == 0, command
    assert any(command.startswith(f"less '{gated.verdict_md(1)}'") for command in commands)


def test_a_narrow_terminal_cuts_no_number(tmp_path: Path) -> None:
    run, writer = make_run(tmp_path)
    writer.finish("COMPLETED", 0)
    train(run, [39, 40])
    console = Console(width=1000, color_system=None)
    cells = {"try": "1", "step": "40/40", "loss": "0.0625", "s/step": "3.00", "samples/s": "5.25", "ETA": "-"}
    for width, dropped in ((40, {"samples/s", "try", "s/step"}), (80, {"samples/s"}), (160, set())):
        with console.capture() as capture:
            console.print(render_status(collect_status([run]), width=width))
        heading, *rows = capture.get().split("\n\n")[0].splitlines()
        assert heading.split() == ["job", "name", "state", *(c for c in cells if c not in dropped)]
        assert rows[0].split()[2:] == ["COMPLETED", *(text for c, text in cells.items() if c not in dropped)]
    with console.capture() as capture:
        console.print(render_list(collect_status([run]), width=80))
    assert run.name in capture.get() and "status.json," in capture.get(), "a name can be copied"


def resolved_with(job: dict[str, Any]) -> dict[str, Any]:
    return {"schema_version": 1, "job": job}


def test_a_completed_run_goes_on_with_its_evaluation_and_its_report(tmp_path: Path) -> None:
    run, _ = make_run(tmp_path)
    run.bundle(1).path.mkdir(parents=True)
    status = RunStatus(run=run, job_id="7", state=JobState(state="COMPLETED", source="status.json", exit_code=0))
    job: dict[str, Any] = {"kind": "train", "data": {"validation_fraction": 0.2}}
    write_json_atomically(run.bundle(1).resolved_json, resolved_with(job))
    first, second = next_commands(status)
    assert first.startswith(f"janus-cluster eval {run.path} ")
    assert second.startswith(f"janus-cluster report {run.path} ")
    write_json_atomically(run.bundle(1).resolved_json, resolved_with({"kind": "preflight"}))
    (again,) = next_commands(status)
    assert again.startswith(f"janus-cluster submit {run.links.job_yaml} ")


def test_a_job_that_waits_shows_why_and_until_when(tmp_path: Path) -> None:
    run, _ = make_run(tmp_path)
    state = JobState(state="PENDING", source="squeue", age_s=0.0, reason="Resources", starts_at=time.time() + 725)
    text = shown([RunStatus(run=run, job_id="7", state=state)])
    assert re.search(r"reason: Resources; expected start \d\d:\d\d \(in 12 min\)", text)


def test_a_job_that_cannot_start_shows_what_to_type_and_no_expected_start(tmp_path: Path) -> None:
    run, _ = make_run(tmp_path)
    state = JobState(
        state="PENDING", source="squeue", age_s=0.0, reason="DependencyNeverSatisfied", starts_at=time.time() + 725
    )
    text = shown([RunStatus(run=run, job_id="7", state=state)])
    assert "next: scancel 7" in text and "expected start" not in text and "tail" not in text
    text = shown([RunStatus(run=run, job_id="7", state=replace(state, reason="QOSMaxJobsPerUserLimit"))])
    assert "next: squeue --me" in text and f"next: janus-cluster tail {run.path}" in text and "expected start" in text


def test_a_suspended_job_shows_what_lets_it_go_on(tmp_path: Path) -> None:
    status = RunStatus(run=RunDir(tmp_path / "r"), job_id="7", state=JobState(state="SUSPENDED", source="squeue"))
    assert next_commands(status)[0].split("   #")[0] == "scontrol resume 7"


def test_a_state_without_a_source_is_shown_as_such(tmp_path: Path) -> None:
    run, _ = make_run(tmp_path)
    state = JobState(state="UNKNOWN", source=NO_SOURCE, reason="Slurm does not answer")
    assert "7: UNKNOWN (source: none)" in shown([RunStatus(run=run, job_id="7", state=state)])


def test_uneven_ranks_are_named_with_their_lowest_and_highest() -> None:
    ranks = {"gpu_memory_peak_gb": (46.12, 78.04, 60.0), "visual_tokens": (9100.0, 15400.0, 12000.0)}
    assert describe_balance(Progress(ranks=ranks)) == [
        "GPU memory peak: 46.1 GB (rank 0) to 78.0 GB (rank 1)",
        "visual tokens a step: 9,100 (rank 0) to 15,400 (rank 1)",
    ]
    assert describe_balance(Progress(ranks={"data_wait_s": (0.5,)})) == []
    assert describe_balance(Progress(ranks={"data_wait_s": (0.501, 0.499)})) == [
        "waiting for data a step: 0.50 s on all 2 ranks"
    ]


def test_of_sixteen_ranks_the_two_that_matter_are_named_with_their_nodes(tmp_path: Path) -> None:
    run, _ = make_run(tmp_path)
    for rank in range(16):
        run.rank_log(1, f"h800-0{1 + rank // 8}", rank).write_text("")
    memory = [60.0] * 16
    memory[2], memory[13] = 46.0, 78.0
    train(run, [1], ranks={"gpu_memory_peak_gb": memory, "visual_tokens": [r * 100 for r in range(16)]})
    (status,) = collect_status([run])
    text = shown([status])
    assert "GPU memory peak: 46.0 GB (rank 2 on h800-01) to 78.0 GB (rank 13 on h800-02)" in text
    assert "visual tokens a step: 0 (rank 0 on h800-01) to 1,500 (rank 15 on h800-02)" in text
    assert status.to_json()["ranks"][13] == {
        "rank": 13,
        "node": "h800-02",
        "gpu_memory_peak_gb": 78.0,
        "visual_tokens": 1300.0,
    }


def test_what_is_slow_is_named_with_its_cost(tmp_path: Path) -> None:
    run, _ = make_run(tmp_path)
    run.health_jsonl(1, "h800-02").parent.mkdir(parents=True)
    for i in range(10):
        clocks = (1400.0, 1400.0, 1288.0)
        gpus = tuple(GpuSample(gpu=g, sm_mhz=mhz, reasons=0x4) for g, mhz in enumerate(clocks))
        HealthSample(time=100.0 + 30 * i, gpus=gpus).append(run.health_jsonl(1, "h800-02"))
    train(run, [1])
    (status,) = map(add_slow, collect_status([run]))
    assert "slow: h800-02 GPU 2: SW power cap, SM clock 1288 MHz (the others: 1400)" in shown([status])
    (slow,) = status.to_json()["slow"]
    assert (slow["kind"], slow["node"], slow["gpu"], slow["since"]) == ("gpu", "h800-02", 2, 100.0)
    assert slow["cost_share"] == pytest.approx(0.08)


def test_a_checkpoint_behind_the_last_logged_step_counts() -> None:
    logged = TrainEvent(attempt=2, step=20, total_steps=24, step_time_s=1.0)
    saved = CheckpointEvent(attempt=2, step=24, path="/c/checkpoint-24")
    progress = build_progress([logged, saved])
    assert (progress.step, progress.eta_s) == (24, 0.0)
    assert build_progress([replace(saved, attempt=1), logged]).step == 20


def test_the_expected_time_is_that_of_the_attempt_that_runs() -> None:
    old = [TrainEvent(attempt=1, step=s, total_steps=9, step_time_s=30.0) for s in (1, 2, 3)]
    new = TrainEvent(attempt=2, step=4, total_steps=9, step_time_s=10.0)
    progress = build_progress([*old, new])
    assert (progress.attempt, progress.median_step_time_s, progress.eta_s) == (2, 10.0, 50.0)


def test_numbers_that_are_none_are_shown_as_such_and_not_used(tmp_path: Path) -> None:
    run, _ = make_run(tmp_path)
    nan = float("nan")
    train(run, [1], loss=nan, step_time_s=nan, samples_per_s=float("inf"), ranks={"data_wait_s": [nan, 0.1]})
    state = JobState(state="RUNNING", source="status.json", attempt=1)
    text = shown([RunStatus(run=run, job_id="7", state=state, progress=load_progress(run))])
    assert text.splitlines()[1].split()[-4:] == ["nan", "-", "-", "-"]
    assert "waiting" not in text


def test_what_is_no_list_of_numbers_by_rank_is_left_out() -> None:
    damaged = {"visual_tokens": [1, "x"], "data_wait_s": None, "gpu_memory_peak_gb": [], "ok": [1, 2.5]}
    assert build_progress(parse_events([json.dumps({"kind": "train", "ranks": damaged})])).ranks == {"ok": (1.0, 2.5)}
    assert build_progress(parse_events(['{"kind": "train", "ranks": 7}'])).ranks == {}


def test_earlier_attempts_are_shown_with_their_reason(tmp_path: Path) -> None:
    run, _ = make_run(tmp_path)
    run.begin_attempt()
    times = {"started_at": 0.5, "ended_at": 1.0}
    AttemptRecord(attempt=1, from_step=4, state="FAILED", reason="rank 1: SIGKILL", **times).write(run.attempt_json(1))
    AttemptRecord(attempt=2, from_step=8, state="RUNNING", started_at=0.5).write(run.attempt_json(2))
    run.begin_attempt()
    assert load_earlier(run, 3) == (
        "attempt 1, from step 4: FAILED: rank 1: SIGKILL",
        "attempt 2, from step 8: killed before it recorded a reason",
    )
