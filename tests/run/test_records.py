"""Every record of a run folder: what is written is read back, and any other content is survived or named."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import threading
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pytest

from janus_cluster.errors import JanusError
from janus_cluster.run.paths import BundleDir, RunDir
from janus_cluster.run.records import (
    attempt,
    bundle,
    failure,
    gate,
    health,
    metrics,
    stall,
    submission,
    training,
    verdict,
)
from janus_cluster.run.records.base import Record

PACKAGE = Path(__file__).resolve().parent.parent.parent / "janus_cluster"
CHECK = verdict.CheckResult(id="gpu", phase="static", node="a", state="FAIL", measured="7", expected="8")
FAILED = failure.FailureRecord(kind="xid", rank=3, node="a", message="Xid 79", frames=("f",), exit_code=12)
SENT = submission.Submission(cluster="slurm", job_id="6", slurm_conf=Path("/etc/slurm.conf"))
RECORDS: list[Record] = [
    bundle.ResolvedRecord(cluster="local", job={"name": "x"}, origins={"name": "--set"}, preflight_profile="cpu"),
    bundle.ManifestRecord(
        created_at="2026-11-29T15:00:00+00:00",
        janus_version="0.2.0",
        git=bundle.GitRecord(commit="c"),
        host="login",
        user="u",
        python=bundle.PythonRecord(version="3.11.2", executable="/usr/bin/python3"),
        packages={"torch": None},
        job_file=bundle.JobFileRecord(path="/j.yaml", sha256="s"),
        templates={"env/cpu.yaml": "s"},
        code=bundle.CodeRecord(path="/p", sha256="s", files={"loss.py": "s"}),
        memory=bundle.PlannedMemoryRecord(option="zero2", planned_gb=1.5),
    ),
    submission.StatusRecord(state="RUNNING", cluster="local", nodes=("a", "b"), started_at=1.5),
    submission.SubmissionRecord(cluster="slurm", job_id="7", command=("sbatch",), history=(SENT,)),
    submission.RetryRecord(attempt=1, exclude=("a",), reason="gpu", not_retried="no such partition"),
    attempt.AttemptRecord(
        attempt=1,
        from_step=0,
        started_at=1.0,
        state="FAILED",
        failure=FAILED,
        hang=attempt.HangRecord(message="no progress", rank=1),
        memory=attempt.MemoryRecord(option=0, words="zero2"),
        bundle=1,
        fallback=attempt.FallbackRecord(bundle=2, because="it ran out of memory"),
    ),
    attempt.StopRecord(signal="SIGUSR1", time=2.0),
    attempt.HeartbeatRecord(rank=0, node="a", doing="step", step=3, has_begun=True, count=9, time=2.0),
    stall.StallRecord(
        rank=0,
        node="a",
        time=2.0,
        count=9,
        groups=(stall.GroupState(name="0", ranks=(0, 1), waits_in=stall.Collective(number=4, name="barrier")),),
        frames=("f",),
    ),
    health.HealthSample(
        time=2.0,
        gpus=(health.GpuSample(gpu=3, sm_mhz=1400.0, reasons=4),),
        link_errors={"mlx5_0:1": {"symbol_error": 2}},
        problem="nvidia-smi is not on PATH",
    ),
    attempt.VersionsRecord(packages={"torch": "2.13.0", "deepspeed": None}),
    failure.RankFailure(rank=0, node="a", time=1.0, type="ValueError", message="x", traceback="T"),
    failure.ScriptFailure(job_id="7", node="a", message="no python"),
    verdict.Verdict(state="FAIL", job_id=None, config_hash="x", nodes=("a",), created_at=1.0, results=(CHECK,)),
    gate.FactsRecord(values={"node": "a", "gpu": {"identity": {"rows": [{"name": "NVIDIA H800"}]}}}),
    gate.ConnectRecord(values={"error": None}),
    gate.AllReduceRecord(values={"times_s": [0.5]}),
    gate.CountersRecord(before={"mlx5_0": {}}, after={"mlx5_0": {}}, gpu_load=({"gpu": 0},)),
    gate.RailsRecord(rails=(gate.Rail(name="ib0", interfaces={"a": "ib0"}),)),
    training.DataRecord(num_samples=3, fingerprint="f", split=training.SplitRecord(held_out=("w",), by="walk")),
    training.CheckpointManifest(step=2, world_size=1, files={"w": training.CheckpointFile(bytes=4, sha256="s")}),
    training.EvaluationRecord(scores={"head": {"accuracy": 0.5}}),
    training.PreparationRecord(compat="none", vggt_path="/v", data={"history": 8}),
    training.BadDataRecord(path="/d", reason="torn", samples_lost=1, absent=True),
    metrics.TrainEvent(step=1, attempt=1, time=1.0, loss=2.5, ranks={"data_wait_s": [0.1]}),
]
NAMES = [type(record).__name__ for record in RECORDS]
each = pytest.mark.parametrize("record", RECORDS, ids=NAMES)


@each
def test_what_is_written_is_read_back(tmp_path: Path, record: Record) -> None:
    path = tmp_path / "record.json"
    record.write(path, mode=0o600)
    assert type(record).load(path) == type(record).require(path) == record
    assert path.stat().st_mode & 0o777 == 0o600
    if record.SCHEMA_VERSION is not None:
        assert json.loads(path.read_text())["schema_version"] == record.SCHEMA_VERSION
    assert [p.name for p in tmp_path.iterdir()] == ["record.json"], "nothing is left of the writing"


@each
def test_keys_that_are_not_known_are_ignored_and_optional_ones_may_be_missing(tmp_path: Path, record: Record) -> None:
    path = tmp_path / "record.json"
    required = {f.name for f in fields(record) if f.default is MISSING and f.default_factory is MISSING}
    value = {key: inner for key, inner in record.to_json().items() if key in required}
    if record.WHOLE is not None:
        return
    path.write_text(json.dumps(value | {"of_a_later_version": {"x": 1}}))
    found = type(record).require(path)
    assert {name: getattr(found, name) for name in required} == {name: getattr(record, name) for name in required}


@each
@pytest.mark.parametrize("damage", ["absent", "empty", "half", "list", "number", "no UTF-8", "folder", "too deep"])
def test_a_file_that_holds_no_record_is_none_and_named_for_who_needs_it(
    tmp_path: Path, record: Record, damage: str
) -> None:
    path = tmp_path / "record.json"
    whole = json.dumps(record.to_json()).encode()
    texts = {"empty": b"", "half": whole[: len(whole) // 2], "list": b"[" + whole + b"]", "number": b"3"}
    texts |= {"no UTF-8": b'{"state": "\xff\xfe"}', "too deep": b"[" * 200_000}
    if damage == "folder":
        path.mkdir()
    elif damage != "absent":
        path.write_bytes(texts[damage])
    assert type(record).load(path) is None
    with pytest.raises(JanusError, match=r"record\.json"):
        type(record).require(path)


@each
def test_a_required_key_of_another_type_makes_a_foreign_file(tmp_path: Path, record: Record) -> None:
    path = tmp_path / "record.json"
    for field in fields(record):
        if field.default is not MISSING or field.default_factory is not MISSING or record.WHOLE is not None:
            continue
        if getattr(record, field.name) is None:
            continue
        path.write_text(json.dumps(record.to_json() | {field.name: [{}]}))
        assert type(record).load(path) is None, field.name
        with pytest.raises(JanusError, match=f"key {field.name}"):
            type(record).require(path)


@each
def test_an_optional_key_of_another_type_has_its_default(tmp_path: Path, record: Record) -> None:
    path = tmp_path / "record.json"
    for field in fields(record):
        is_optional = field.default is not MISSING and "strict" not in field.metadata
        if is_optional and record.WHOLE is None:
            path.write_text(json.dumps(record.to_json() | {field.name: [[1]]}))
            assert getattr(type(record).require(path), field.name) == field.default, field.name


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ({"state": True}, "key state: True is no str"),
        ({"state": None}, "key state: None is no str"),
        ({}, "key state is missing"),
        ({"state": "RUNNING", "schema_version": 9}, "schema_version is 9, known is 1"),
    ],
)
def test_what_is_wrong_is_reported(tmp_path: Path, value: dict[str, Any], problem: str) -> None:
    path = tmp_path / "status.json"
    path.write_text(json.dumps(value))
    with pytest.raises(JanusError) as refused:
        submission.StatusRecord.require(path, hint="look")
    assert (refused.value.message, refused.value.hint) == (f"{path} cannot be used: {problem}", "look")


def test_a_truth_value_is_no_number_and_a_whole_number_is_one(tmp_path: Path) -> None:
    path = tmp_path / "status.json"
    path.write_text('{"state": "RUNNING", "attempt": true, "exit_code": 1.5, "started_at": 3, "updated_at": 1e999}')
    found = submission.StatusRecord.require(path)
    assert (found.attempt, found.exit_code, found.started_at) == (None, None, 3.0)


def test_a_split_that_cannot_be_read_is_never_taken_for_none(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    value = {"num_samples": 3, "fingerprint": "f"}
    path.write_text(json.dumps(value))
    assert training.DataRecord.require(path).split is None
    path.write_text(json.dumps(value | {"split": {"by": "another rule", "held_out": ["w"]}}))
    assert training.DataRecord.load(path) is None


def test_a_failure_of_a_class_that_is_not_known_is_not_shown(tmp_path: Path) -> None:
    path = tmp_path / "attempt.json"
    value = {"attempt": 1, "from_step": 0, "started_at": 1.0, "state": "FAILED", "failure": {"kind": "of a later one"}}
    path.write_text(json.dumps(value))
    assert attempt.AttemptRecord.require(path).failure is None


def test_a_name_that_is_no_utf8_can_be_written(tmp_path: Path) -> None:
    path = tmp_path / "failure.json"
    record = failure.RankFailure(rank=0, node="a", time=1.0, type="OSError", message="/d/\udcff.png")
    record.write(path)
    assert failure.RankFailure.require(path).message == "/d/\udcff.png"


def test_a_reader_never_sees_half_a_file(tmp_path: Path) -> None:
    path = tmp_path / "attempt.json"
    base = {"attempt": 1, "from_step": 0, "started_at": 1.0, "state": "RUNNING"}
    records = [attempt.AttemptRecord(**base, reason=letter * 200_000) for letter in "ab"]
    records[0].write(path)
    is_over = threading.Event()

    def write() -> None:
        while not is_over.is_set():
            for record in records:
                record.write(path)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(200):
            assert attempt.AttemptRecord.load(path) in records
    finally:
        is_over.set()
        writer.join()


def test_a_full_disk_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "stop.json"
    attempt.StopRecord(signal="SIGTERM", time=1.0).write(path)
    code = (
        "import resource, sys; from pathlib import Path\n"
        "from janus_cluster.run.records.attempt import StopRecord\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "StopRecord(signal='x' * 100_000, time=2.0).write(Path(sys.argv[1]))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode != 0 and "stop.json" in done.stderr
    assert attempt.StopRecord.require(path).signal == "SIGTERM"
    assert [p.name for p in tmp_path.iterdir()] == ["stop.json"]


def test_lines_of_metrics_that_hold_no_event_are_left_out(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    metrics.append_event(run, metrics.TrainEvent(step=1))
    with run.metrics_jsonl.open("ab") as f:
        f.write(
            b'{"kind": "train", "st\n3\n[1]\n\xff\n{"kind": "of a later version"}\n{"kind": ["train"]}\n{"step": 2}\n'
        )
        f.write(b'{"kind": "stop", "step": 3}\n{"kind": "train", "step": 4')
    assert [(event.KIND, event.step) for event in metrics.read_events(run)] == [("train", 1), ("stop", 3)]
    assert sum(line is None for line in metrics.read_lines(run)) == 7
    assert metrics.load_last_events(run, most_bytes=70) == [metrics.StopEvent(step=3)]


def test_the_fast_commands_read_records_without_pydantic() -> None:
    names = ("attempt", "bundle", "metrics", "submission", "verdict")
    modules = ", ".join(f"janus_cluster.run.records.{name}" for name in names)
    code = f"import sys, {modules}; sys.exit('pydantic' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Modules of the rooms that use run folders and parse JSON that no record of the run folder is.
PARSES = {
    "diagnosis/evidence.py": "torchrun's error files",
    "node/connect.py": "what the nodes send each other",
    "preflight/calibration.py": "the site's baseline and history",
    "preflight/survey.py": "what one node prints for init",
    "preflight/unwritten.py": "lines in the batch log of nodes that cannot write files",
    "run/files.py": "read_json itself",
    "run/next_command.py": "where runs were made, beside the site's records",
    "training/published.py": "files of transformers",
}
ROOMS = ("cli", "desk", "diagnosis", "node", "observe", "preflight", "report", "run", "training")


def parses_json(node: ast.AST) -> bool:
    if not isinstance(node, ast.Call):
        return False
    name = ast.unparse(node.func)
    return name in ("json.loads", "json.load", "read_json", "parse_json") or name.endswith("model_validate_json")


def test_no_other_module_parses_a_file_of_the_run_folder() -> None:
    records = {name for name in {*dir(RunDir), *dir(BundleDir)} if name.endswith(("_json", "_jsonl"))}
    for path in (p for room in ROOMS for p in sorted((PACKAGE / room).rglob("*.py"))):
        name = path.relative_to(PACKAGE).as_posix()
        if name.startswith("run/records/"):
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert name in PARSES or not any(map(parses_json, ast.walk(tree))), (
            f"{name} parses JSON: of a run folder's file, give it a type in run/records/; of another, name it here"
        )
        for function in (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)):
            used = {n.attr for n in ast.walk(function) if isinstance(n, ast.Attribute)} & records
            assert not (used and any(map(parses_json, ast.walk(function)))), f"{name}: {function.name} parses {used}"
