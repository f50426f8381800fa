"""resume and cancel as a user types them, on jobs that are processes of this machine."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from janus_cluster.desk.amend import leaf_keys, may_change
from janus_cluster.desk.resume import resume
from janus_cluster.desk.submit import Request, submit
from janus_cluster.errors import UsageError
from janus_cluster.run.files import read_json, write_json_atomically
from janus_cluster.run.paths import RunDir
from tests.tiny_data import write_tiny_data

pytestmark = pytest.mark.slow

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def janus(tmp_path: Path) -> Run:
    write_tiny_data(tmp_path / "demo_data")

    def call(*argv: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "janus_cluster.cli", *argv],
            cwd=tmp_path,
            env=os.environ | {"JANUS_HOME": str(tmp_path / "home")},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=600,
        )

    return call


@pytest.fixture
def run(janus: Run) -> Iterator[RunDir]:
    """A run folder of this machine whose script sleeps; what was started is ended with the test."""
    done = janus("submit", "demo", "--cluster", "local", "--dry-run", "--json")
    found = RunDir(Path(json.loads(done.stdout)["run_dir"]))
    found.bundle(1).job_sbatch.write_text("echo begun; sleep 600 & wait\n")
    yield found
    if found.submission_json.exists():
        # Not `cancel`, which rightly leaves a run alone that a test has called completed. The script leads a group.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(int(str(sent(found)["job_id"]).removeprefix("local-")), signal.SIGKILL)


def sent(run: RunDir) -> dict[str, object]:
    value: dict[str, object] = read_json(run.submission_json)
    return value


def wait_until_gone(run: RunDir) -> None:
    pid = str(sent(run)["job_id"]).removeprefix("local-")
    deadline = time.monotonic() + 20
    while (Path("/proc") / pid / "cmdline").exists() and (Path("/proc") / pid / "cmdline").read_bytes():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def write_status(run: RunDir, **word: object) -> None:
    base = {"cluster": "local", "job_id": sent(run)["job_id"], "attempt": 1, "nodes": ["local-01"], "state": "RUNNING"}
    write_json_atomically(run.status_json, base | {"started_at": time.time(), "updated_at": time.time()} | word)


def test_an_ended_run_goes_on_in_its_own_folder_and_a_live_one_is_refused(janus: Run, run: RunDir) -> None:
    assert janus("resume", str(run.path)).returncode == 0
    first = sent(run)["job_id"]
    refused = janus("resume", run.name)
    assert refused.returncode == 2
    assert "is RUNNING" in refused.stderr
    assert f"janus-cluster cancel {run.name}" in refused.stderr
    assert sent(run)["job_id"] == first
    assert janus("cancel", str(first)).returncode == 0
    wait_until_gone(run)
    checkpoint = run.checkpoints / "checkpoint-40"
    checkpoint.mkdir(parents=True)
    write_json_atomically(checkpoint / "manifest.json", {"schema_version": 2, "step": 40, "files": {}})
    done = janus("resume", run.name)
    assert done.returncode == 0, done.stderr
    assert "resumes from  checkpoint-40" in done.stdout
    value = sent(run)
    assert f"janus-cluster tail {run.name}" in done.stdout
    assert value["job_id"] != first
    assert [h["job_id"] for h in value["history"]] == [first]  # type: ignore[attr-defined]
    assert run.batch_log.read_text().count("begun") >= 1


def test_for_programs_resume_and_cancel_print_one_object(janus: Run, run: RunDir) -> None:
    resumed = json.loads(janus("resume", str(run.path), "--json").stdout)
    assert resumed == {
        "run_dir": str(run.path),
        "job_id": sent(run)["job_id"],
        "cluster": "local",
        "checkpoint": None,
        "changes": [],
        "notes": [],
    }
    write_status(run, started_at=time.time() - 3600)
    refused = janus("cancel", run.name, "--json")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "would lose 60 minutes" in refused.stderr
    cancelled = json.loads(janus("cancel", run.name, "--json", "--yes").stdout)
    assert (cancelled["job_id"], cancelled["lost"]["minutes"]) == (resumed["job_id"], pytest.approx(60, abs=1))
    assert "SIGTERM" in cancelled["said"]


def test_a_completed_run_is_not_resumed(janus: Run, run: RunDir) -> None:
    janus("resume", str(run.path))
    write_status(run, state="COMPLETED", exit_code=0)
    done = janus("resume", run.name)
    assert done.returncode == 2
    assert "has completed" in done.stderr
    assert f"janus-cluster submit {run.links.job_yaml}" in done.stderr


def test_a_run_that_never_resumes_is_refused(janus: Run) -> None:
    done = janus("submit", "demo", "--cluster", "local", "--dry-run", "--json", "--set", "checkpoint.resume=never")
    refused = janus("resume", json.loads(done.stdout)["run_dir"])
    assert refused.returncode == 2
    assert "begin at step 0 over its own results" in refused.stderr


def test_two_resumes_at_once_are_refused(janus: Run, run: RunDir) -> None:
    with run.submit_lock.open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        refused = janus("resume", run.name)
    assert refused.returncode == 2
    assert "another janus-cluster is sending" in refused.stderr
    assert not run.submission_json.exists()


def test_a_folder_that_is_no_run_is_reported(janus: Run, run: RunDir) -> None:
    run.bundle(1).resolved_json.write_text("{}")
    refused = janus("resume", str(run.path))
    assert refused.returncode == 2
    assert "cannot be read by this version" in refused.stderr
    assert "Traceback" not in refused.stderr


@pytest.mark.parametrize(
    ("minutes_of_attempt", "minutes_of_checkpoint", "is_asked"),
    [(9, None, False), (11, None, True), (60, 5, False), (60, 30, True)],
)
def test_cancel_asks_when_much_would_be_lost(
    janus: Run, run: RunDir, minutes_of_attempt: float, minutes_of_checkpoint: float | None, is_asked: bool
) -> None:
    janus("resume", str(run.path))
    write_status(run, started_at=time.time() - 60 * minutes_of_attempt)
    if minutes_of_checkpoint is not None:
        folder = run.checkpoints / "checkpoint-7"
        folder.mkdir(parents=True)
        write_json_atomically(folder / "manifest.json", {"schema_version": 2, "step": 7, "files": {}})
        when = time.time() - 60 * minutes_of_checkpoint
        os.utime(folder / "manifest.json", (when, when))
    done = janus("cancel", run.name)
    if not is_asked:
        assert done.returncode == 0, done.stderr
        return
    since = "checkpoint-7" if minutes_of_checkpoint else "the start of attempt 1"
    minutes = minutes_of_checkpoint or minutes_of_attempt
    assert done.returncode == 2
    assert f"would lose {minutes} minutes of work since {since}" in done.stderr
    assert f"next:  janus-cluster cancel {run.name} --yes" in done.stderr
    assert janus("cancel", run.name, "--yes").returncode == 0


NAMES = ("job.yaml", "resolved.json", "job.sbatch", "env.sh", "ds_config.json", "manifest.json")


def links(run: RunDir) -> set[str]:
    """Where the links at the top of the run folder lead: one folder, when they were switched."""
    return {str((run.path / name).readlink().parent) for name in NAMES}


def everything(run: RunDir) -> dict[str, bytes]:
    """Every file of the run but the lock, with its bytes; every link, with where it leads."""
    files = (p for p in run.path.rglob("*") if (p.is_file() or p.is_symlink()) and p != run.submit_lock)
    return {str(p.relative_to(run.path)): bytes(p.readlink()) if p.is_symlink() else p.read_bytes() for p in files}


SETS = ("environment.python=/bin/true", "training.gradient_accumulation_steps=4", "preflight.min_free_gb=0.25")
OVERRIDES = "deepspeed.overrides={zero_optimization.stage3_max_live_parameters: 1e8}"


@pytest.fixture
def two_nodes(janus: Run) -> RunDir:
    """A run of two nodes of this machine, 2 ranks × 4 rows × 4 = 32 samples a step. Its script ends at once."""
    words = [word for text in (*SETS, OVERRIDES) for word in ("--set", text)]
    done = janus("submit", "demo", "--cluster", "local", "--dry-run", "--json", *words)
    assert done.returncode == 0, done.stderr
    return RunDir(Path(json.loads(done.stdout)["run_dir"]))


@pytest.fixture(scope="module")
def amendable(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """The same for those who write nothing."""
    folder = tmp_path_factory.mktemp("amendable")
    root = write_tiny_data(folder / "data")
    request = Request(job="demo", cluster="local", dry_run=True, sets=(*SETS, f"data.roots=[{root}]"))
    return submit(request, environ={"JANUS_HOME": str(folder / "home")}, cwd=folder).run


@pytest.mark.slow
def test_a_run_of_two_nodes_goes_on_on_one_and_back_with_the_same_effective_batch(
    janus: Run, two_nodes: RunDir
) -> None:
    before = everything(two_nodes)
    done = janus("resume", two_nodes.name, "--nodes", "1", "--set", "deepspeed.profile=zero2")
    assert done.returncode == 0, done.stderr
    for line in (
        "nodes: 2 → 1",
        'deepspeed.profile: "zero3" → "zero2"',
        "training.gradient_accumulation_steps: 4 → 8 (keeps the effective batch of 32)",
        "checkpoints of 2 processes under ZeRO-3 are cut anew for 1 process under ZeRO-2",
    ):
        assert f"changed       {line}\n" in done.stdout
    second = two_nodes.bundle(2)
    now, config = read_json(second.resolved_json), read_json(second.ds_config_json)
    assert (now["job"]["nodes"], now["world_size"], now["effective_batch_size"]) == (1, 1, 32)
    assert now["origins"]["nodes"] == "resume --nodes"
    assert now["origins"]["training.gradient_accumulation_steps"] == "resume: keeps the effective batch of 32"
    assert (config["zero_optimization"]["stage"], config["gradient_accumulation_steps"]) == (2, 8)
    assert config["train_batch_size"] == 32
    assert "#SBATCH --nodes=1\n" in second.job_sbatch.read_text() and os.access(second.job_sbatch, os.X_OK)
    assert second.manifest_json.read_bytes() == two_nodes.bundle(1).manifest_json.read_bytes()
    assert (sent(two_nodes)["bundle"], sent(two_nodes)["command"]) == (2, ["bash", str(second.job_sbatch)])
    assert links(two_nodes) == {"bundles/2"}
    after = everything(two_nodes)
    assert {n: after[n] for n in before if n.startswith("bundles/")} == {
        n: data for n, data in before.items() if n.startswith("bundles/")
    }
    again = janus("submit", str(two_nodes.links.job_yaml), "--cluster", "local", "--dry-run", "--json")
    assert json.loads(again.stdout)["ds_config"] == config, "job.yaml is that job"

    wait_until_gone(two_nodes)
    back = janus("resume", two_nodes.name, "--nodes", "2", "--set", "deepspeed.profile=zero3")
    assert back.returncode == 0, back.stderr
    third, first = read_json(two_nodes.bundle(3).resolved_json), read_json(two_nodes.bundle(1).resolved_json)
    assert (third.pop("bundle"), first.pop("bundle")) == (3, 1)
    for value in (third, first):
        del value["origins"]
    assert third == first
    for name in ("job.sbatch", "env.sh", "ds_config.json"):
        text = (two_nodes.bundle(3).path / name).read_text()
        text = text.replace("bundles/3/", "bundles/1/").replace("--bundle 3 ", "--bundle 1 ")
        assert text == (two_nodes.bundle(1).path / name).read_text()
    assert two_nodes.bundle_numbers() == [1, 2, 3]


def test_resume_without_options_changes_no_byte_of_the_bundle(janus: Run, two_nodes: RunDir) -> None:
    before = everything(two_nodes)
    assert janus("resume", two_nodes.name).returncode == 0
    after = everything(two_nodes)
    assert {name: after[name] for name in before} == before
    assert two_nodes.bundle_numbers() == [1]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--set", "training.learning_rate=3e-5"), ["training.learning_rate: 0.001 → 3e-05", "submit a new run"]),
        (
            ("--set", "training.tune.vision=false", "--set", "name=other"),
            ["2 problems", "training.tune.vision", "name"],
        ),
        (("--set", "data.roots=[/elsewhere]"), ["data.roots", "not what the run has learnt with"]),
        (("--set", "training.max_steps=100"), ["training.max_steps: 250 → 100", "may only become longer"]),
        (("--set", "training.num_worms=1"), ["unknown key"]),
        (("--nodes", "3"), ["4 × 3 ranks do not divide the run's effective batch of 32"]),
        (
            ("--set", "training.per_device_batch_size=5"),
            ["5 × 2 ranks do not divide the run's effective batch of 32", "one of 1, 2, 4, 8, 16"],
        ),
        (("--set", "hardware.processes_per_node=3"), ["no per_device_batch_size does on 6 ranks"]),
        (
            ("--nodes", "1", "--set", "training.gradient_accumulation_steps=4"),
            ["4 per rank × 4 × 1 ranks is 16", "leave the key out: 8 is taken then"],
        ),
        (("--set", "training.effective_batch_size=64"), ["the run's is 32, and it is kept"]),
        (("--set", "checkpoint.resume=never"), ["begin at step 0 over its own results"]),
        (
            ("--set", "deepspeed.overrides={zero_optimization.offload_optimizer: {device: nvme}}", "--nodes", "1"),
            ["written by 2 processes under ZeRO-3", "offload_optimizer.device: nvme", "keep 2 × 1 processes"],
        ),
    ],
)
def test_what_may_not_change_is_refused_by_name_and_nothing_is_written(
    amendable: RunDir, tmp_path: Path, options: tuple[str, ...], words: list[str]
) -> None:
    before = everything(amendable)
    nodes = next((int(value) for name, value in itertools.pairwise(options) if name == "--nodes"), None)
    sets = [value for name, value in itertools.pairwise(options) if name == "--set"]
    with pytest.raises(UsageError) as refused:
        resume(amendable, environ={"JANUS_HOME": str(tmp_path)}, nodes=nodes, sets=sets, cwd=tmp_path)
    for word in words:
        assert word in f"{refused.value.message} {refused.value.hint}"
    assert everything(amendable) == before


def test_every_key_that_decides_what_is_learnt_is_refused() -> None:
    free = {key for key in leaf_keys() if may_change(key)}
    assert {"training.learning_rate", "training.seed", "training.precision", "data.history", "model.lam"}.isdisjoint(
        free
    )
    assert not any(key.startswith(("model.", "training.tune", "training.lora", "training.segment_")) for key in free)
    assert {key for key in free if key.startswith("data.")} == {
        "data.num_workers",
        "data.index_dir",
        "data.image_roots",
    }


@pytest.mark.slow
def test_a_completed_run_goes_on_where_it_is_given_more_steps(janus: Run, two_nodes: RunDir) -> None:
    janus("resume", two_nodes.name)
    wait_until_gone(two_nodes)
    write_status(two_nodes, state="COMPLETED", exit_code=0)
    refused = janus("resume", two_nodes.name, "--nodes", "1")
    assert refused.returncode == 2
    assert "has completed" in refused.stderr and "--set training.max_steps=" in refused.stderr
    done = janus("resume", two_nodes.name, "--set", "training.max_steps=300")
    assert done.returncode == 0, done.stderr
    assert "training.max_steps: 250 → 300" in done.stdout
    assert "the learning rate follows a cosine over the new length from now on" in done.stdout


@pytest.mark.slow
def test_secrets_and_forwarded_variables_stay_those_of_the_submission(
    janus: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_submission")
    monkeypatch.setenv("SITE", "there")
    forward = ("--set", "environment.forward=[HF_TOKEN, SITE]", "--set", "environment.python=/bin/true")
    done = janus("submit", "demo", "--cluster", "local", "--dry-run", "--json", *forward)
    run = RunDir(Path(json.loads(done.stdout)["run_dir"]))
    monkeypatch.setenv("SITE", "elsewhere")
    monkeypatch.delenv("HF_TOKEN")
    assert janus("resume", run.name, "--nodes", "1").returncode == 0
    first, second = run.bundle(1), run.bundle(2)
    assert second.secrets_env.read_text() == first.secrets_env.read_text()
    assert second.env_sh.read_text().replace("bundles/2/", "bundles/1/") == first.env_sh.read_text()
    assert second.secrets_env.stat().st_mode & 0o777 == 0o600
    assert "hf_of_the_submission" not in second.env_sh.read_text()
    assert second.path.stat().st_mode & 0o777 == 0o700


@pytest.mark.slow
def test_nothing_has_changed_when_sbatch_refuses(janus: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin").mkdir()
    for name, text in (("sbatch", "echo sbatch: error: invalid account >&2; exit 1"), ("srun", "")):
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    run = RunDir(Path(json.loads(janus("submit", "demo", "--dry-run", "--json").stdout)["run_dir"]))
    before = everything(run)
    refused = janus("resume", run.name, "--nodes", "1", "--set", "slurm.account=nobody")
    assert refused.returncode == 2
    assert "invalid account" in refused.stderr
    after = everything(run)
    assert {name: text for name, text in after.items() if not name.startswith("submitit/")} == before
    assert [p.name for p in run.bundles.iterdir()] == ["1"]


@pytest.mark.slow
def test_a_resume_that_was_killed_before_sbatch_leaves_a_bundle_that_nothing_minds(
    janus: Run, two_nodes: RunDir
) -> None:
    before = everything(two_nodes)
    code = (
        "import os, sys; from pathlib import Path\n"
        "from janus_cluster.desk.amend import amend\n"
        "from janus_cluster.run.bundle import bundles_added, render_bundles\n"
        "from janus_cluster.run.current import current_bundle\n"
        "from janus_cluster.run.records.bundle import ManifestRecord, load_resolved\n"
        "from janus_cluster.run.paths import RunDir\n"
        "run = RunDir(Path(sys.argv[1])); resolved = load_resolved(current_bundle(run))\n"
        "manifest = ManifestRecord.require(run.links.manifest_json)\n"
        "new = amend(run, resolved, nodes=1, sets=(), environ={}, cwd=Path.cwd())\n"
        "bundles = render_bundles(new.resolved, job_yaml_text=new.job_yaml_text, secrets={}, manifest=manifest)\n"
        "with bundles_added(run, bundles): os._exit(9)\n"
    )
    assert subprocess.run([sys.executable, "-c", code, str(two_nodes.path)], check=False).returncode == 9
    assert two_nodes.bundle_numbers() == [1, 2]
    done = janus("resume", two_nodes.name)
    assert done.returncode == 0, done.stderr
    assert (sent(two_nodes)["bundle"], links(two_nodes)) == (1, {"bundles/1"})
    after = everything(two_nodes)
    assert {name: after[name] for name in before} == before
    wait_until_gone(two_nodes)
    done = janus("resume", two_nodes.name, "--nodes", "1")
    assert done.returncode == 0, done.stderr
    assert (sent(two_nodes)["bundle"], two_nodes.bundle_numbers()) == (3, [1, 2, 3])


def test_a_run_folder_of_an_older_version_is_refused_and_listed(janus: Run, run: RunDir) -> None:
    for name in NAMES:
        (run.path / name).unlink()
        (run.bundle(1).path / name).rename(run.path / name)
    run.bundle(1).path.rmdir()
    run.bundles.rmdir()
    before = everything(run)
    for command in ("resume", "status", "tail", "cancel", "report", "eval", "export"):
        refused = janus(command, run.name)
        assert refused.returncode == 2, f"{command}: {refused.stdout} {refused.stderr}"
        assert "was made by janus-cluster 0.1" in refused.stderr
        assert f"janus-cluster submit {run.path / 'job.yaml'}" in refused.stderr
    other = json.loads(janus("submit", str(run.path / "job.yaml"), "--cluster", "local", "--dry-run", "--json").stdout)
    rows = {row["name"]: row for row in json.loads(janus("list", "--json").stdout)}
    assert rows[run.name]["source"] == "made by janus-cluster 0.1"
    assert rows[Path(other["run_dir"]).name]["state"] == "NOT_SUBMITTED"
    assert "made by janus-cluster 0.1" in janus("list").stdout
    assert run.name not in janus("status").stdout
    assert everything(run) == before
