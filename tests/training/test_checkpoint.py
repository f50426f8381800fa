"""What becomes of checkpoints: whole ones are found, damaged ones are named and passed over, a full disk loses none."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from training_run import CPU, free_port, write_run_folder

from janus_cluster.diagnosis.failure import kind_of_message
from janus_cluster.errors import TrainingFailed
from janus_cluster.janusvln.world.demo import write_demo_episodes
from janus_cluster.run.checkpoints import find_newest_complete, load_manifest
from janus_cluster.run.files import read_json, write_json_atomically
from janus_cluster.run.records.failure import RankFailure
from janus_cluster.training.checkpoint import agree_on_resume, remove_old, share_out, write_manifest
from janus_cluster.training.saving import PARTIAL_NAME, new_checkpoint, warn_of_slow_save
from janus_cluster.training.world import World
from tests.conftest import not_tested

pytestmark = pytest.mark.train

ALONE = World(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"))
WORKER = Path(__file__).with_name("checkpoint_worker.py")


def make_checkpoint(checkpoints: Path, step: int, *, whole: bool = True) -> Path:
    folder = checkpoints / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "weights.bin").write_bytes(b"w" * step)
    if whole:
        write_manifest(folder, step=step, world_size=1)
    return folder


def save(checkpoints: Path, step: int, *, keep_last: int = 9, keep_every: int | None = None) -> Path:
    """A checkpoint as training writes it, with two files in a folder and one beside it."""
    with new_checkpoint(checkpoints, step=step, world=ALONE, keep_last=keep_last, keep_every=keep_every) as aside:
        folder = aside / f"checkpoint-{step}"
        (folder / "state").mkdir(parents=True)
        for name in ("state/rank0.pt", "state/rank1.pt", "latest"):
            (folder / name).write_bytes(f"{name} at step {step} ".encode() * 5000)
    return checkpoints / f"checkpoint-{step}"


def names_in(checkpoints: Path) -> list[str]:
    return sorted(p.name for p in checkpoints.iterdir())


def test_a_checkpoint_lists_what_is_in_it_and_nothing_else_is_left(tmp_path: Path) -> None:
    folder = save(tmp_path, 7)
    assert names_in(tmp_path) == ["checkpoint-7"]
    manifest = read_json(folder / "manifest.json")
    assert (manifest["schema_version"], manifest["step"], manifest["world_size"]) == (2, 7, 1)
    assert sorted(manifest["files"]) == ["latest", "state/rank0.pt", "state/rank1.pt"]
    assert time.time() - manifest["written_at"] < 60
    for name, file in manifest["files"].items():
        output = subprocess.run(["sha256sum", folder / name], capture_output=True, text=True, check=True).stdout
        assert (file["sha256"], file["bytes"]) == (output.split()[0], (folder / name).stat().st_size)
    found = agree_on_resume(tmp_path, resume="auto", world=ALONE)
    assert (found.checkpoint, found.passed_over) == (folder, ())


def truncate(folder: Path) -> None:
    os.truncate(folder / "state" / "rank1.pt", 1000)


def empty(folder: Path) -> None:
    (folder / "state" / "rank1.pt").write_bytes(b"")


def flip_a_bit(folder: Path) -> None:
    data = bytearray((folder / "state" / "rank1.pt").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "state" / "rank1.pt").write_bytes(data)


def remove_a_file(folder: Path) -> None:
    (folder / "state" / "rank1.pt").unlink()


def remove_the_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def halve_the_manifest(folder: Path) -> None:
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(text[: len(text) // 2])


def empty_the_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_bytes(b"")


def name_another_step(folder: Path) -> None:
    manifest = read_json(folder / "manifest.json")
    write_json_atomically(folder / "manifest.json", manifest | {"step": 5})


DAMAGES: list[tuple[Callable[[Path], None], str]] = [
    (truncate, "state/rank1.pt: 1000 bytes, 125000 were written"),
    (empty, "state/rank1.pt: 0 bytes, 125000 were written"),
    (flip_a_bit, "state/rank1.pt: sha256 "),
    (remove_a_file, "state/rank1.pt: not there"),
    (remove_the_manifest, "manifest.json: not there, so it was not written to its end"),
    (halve_the_manifest, "manifest.json: not readable (JSONDecodeError"),
    (empty_the_manifest, "manifest.json: not readable (JSONDecodeError"),
    (name_another_step, "manifest.json: its step is 5"),
]


@pytest.mark.parametrize(("damage", "words"), DAMAGES, ids=[damage.__name__ for damage, _ in DAMAGES])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    tmp_path: Path, damage: Callable[[Path], None], words: str
) -> None:
    before, newest = save(tmp_path, 2), save(tmp_path, 4)
    damage(newest)
    output: list[str] = []
    found = agree_on_resume(tmp_path, resume="auto", world=ALONE, report=output.append)
    assert found.checkpoint == before
    assert [(p.step, p.path) for p in found.passed_over] == [(4, tmp_path / "checkpoint-4.broken")]
    assert found.passed_over[0].reason.startswith(words)
    assert len(output) == 1 and str(newest) in output[0] and words in output[0] and "checkpoint-4.broken" in output[0]
    assert names_in(tmp_path) == ["checkpoint-2", "checkpoint-4.broken"], "nothing is deleted"
    # Once there is something newer that is whole, it goes.
    save(tmp_path, 3)
    assert "checkpoint-4.broken" in names_in(tmp_path)
    save(tmp_path, 4)
    assert names_in(tmp_path) == ["checkpoint-2", "checkpoint-3", "checkpoint-4"]


def test_no_whole_checkpoint_means_step_0_and_that_is_reported(tmp_path: Path) -> None:
    for step in (1, 2):
        flip_a_bit(save(tmp_path, step))
    output: list[str] = []
    found = agree_on_resume(tmp_path, resume="auto", world=ALONE, report=output.append)
    assert found.checkpoint is None and [p.step for p in found.passed_over] == [2, 1]
    assert output[-1] == f"no checkpoint in {tmp_path} is whole: training begins at step 0"
    assert names_in(tmp_path) == ["checkpoint-1.broken", "checkpoint-2.broken"]


def test_one_that_breaks_twice_keeps_both(tmp_path: Path) -> None:
    for _ in range(2):
        make_checkpoint(tmp_path, 3, whole=False)
        agree_on_resume(tmp_path, resume="auto", world=ALONE)
    assert names_in(tmp_path) == ["checkpoint-3.broken", "checkpoint-3.broken-2"]


def test_a_file_that_may_not_be_read_is_no_damage(tmp_path: Path) -> None:
    folder = save(tmp_path, 3)
    (folder / "latest").unlink()
    (folder / "latest").symlink_to("latest")
    with pytest.raises(OSError, match="symbolic links"):
        agree_on_resume(tmp_path, resume="auto", world=ALONE)
    assert names_in(tmp_path) == ["checkpoint-3"]


def test_a_checkpoint_of_another_number_of_processes_is_resumed_unless_resume_is_never(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, 7, whole=False)
    write_manifest(folder, step=7, world_size=16)
    assert agree_on_resume(tmp_path, resume="auto", world=ALONE).checkpoint == folder
    assert agree_on_resume(tmp_path, resume="never", world=ALONE).checkpoint is None


def test_the_newest_whole_checkpoint_is_found_by_step_not_by_name(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, 9)
    newest = make_checkpoint(tmp_path, 10)
    make_checkpoint(tmp_path, 20, whole=False)
    assert find_newest_complete(tmp_path) == newest
    (newest / "weights.bin").write_bytes(b"short")
    assert find_newest_complete(tmp_path) == tmp_path / "checkpoint-9"


def test_no_checkpoint_is_no_error(tmp_path: Path) -> None:
    assert find_newest_complete(tmp_path / "never-made") is None
    assert agree_on_resume(tmp_path / "never-made", resume="auto", world=ALONE).checkpoint is None


def test_old_checkpoints_go_and_what_is_newer_stays(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        make_checkpoint(tmp_path, step)
    make_checkpoint(tmp_path, 2000, whole=False)
    make_checkpoint(tmp_path, 0, whole=False)
    for name in ("checkpoint-3.broken-2", "checkpoint-9.broken"):
        (tmp_path / name).mkdir()
    remove_old(tmp_path, keep_last=2)
    assert names_in(tmp_path) == ["checkpoint-2", "checkpoint-2000", "checkpoint-3", "checkpoint-9.broken"]


def test_every_so_many_steps_one_stays_for_ever(tmp_path: Path) -> None:
    for step in range(1, 9):
        save(tmp_path, step, keep_last=2, keep_every=3)
    assert names_in(tmp_path) == ["checkpoint-3", "checkpoint-6", "checkpoint-7", "checkpoint-8"]


def test_a_checkpoint_of_that_name_is_replaced_only_by_a_whole_one(tmp_path: Path) -> None:
    folder = save(tmp_path, 3)
    before = (folder / "manifest.json").read_bytes()
    with (
        pytest.raises(RuntimeError, match="out of the blue"),
        new_checkpoint(tmp_path, step=3, world=ALONE, keep_last=2) as aside,
    ):
        (aside / "checkpoint-3").mkdir()
        raise RuntimeError("out of the blue")
    assert (folder / "manifest.json").read_bytes() == before and find_newest_complete(tmp_path) == folder
    make_checkpoint(tmp_path, 12)
    save(tmp_path, 3, keep_last=1)
    assert (folder / "manifest.json").read_bytes() != before
    assert names_in(tmp_path) == ["checkpoint-12", "checkpoint-3"], "the one just written stays"


@pytest.mark.parametrize("num_ranks", [1, 3, 16])
def test_the_ranks_share_the_reading_about_evenly(num_ranks: int) -> None:
    sizes = {f"file{n}": 1 + n * 7919 % 1000 for n in range(200)}
    shares = share_out(sizes, num_ranks)
    assert sorted(name for share in shares for name in share) == sorted(sizes)
    loads = [sum(sizes[name] for name in share) for share in shares]
    assert max(loads) - min(loads) <= 1000


def run_worker(*arguments: str, worker: Path = WORKER, num_ranks: int = 2) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(num_ranks), "--master-addr",
        "127.0.0.1", "--master-port", str(free_port()), str(worker), *arguments,
    ]  # fmt: skip
    env = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=600)


def answers(done: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    """What the ranks printed. The gloo of torch 2.8 prints lines of its own between them."""
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def test_all_ranks_agree_on_what_one_of_them_found(tmp_path: Path) -> None:
    for step in ("1", "2"):
        done = run_worker("save", str(tmp_path), step, "2", "1")
        assert done.returncode == 0, done.stderr
    manifest = load_manifest(tmp_path / "checkpoint-2")
    assert sorted(manifest.files) == ["state/rank0.pt", "state/rank1.pt"]
    assert read_json(tmp_path / "checkpoint-2" / "manifest.json")["world_size"] == 2
    # The smaller file is the second rank's to read.
    flip_a_bit(tmp_path / "checkpoint-2")
    done = run_worker("resume", str(tmp_path))
    assert done.returncode == 0, done.stderr
    output = sorted(answers(done), key=lambda found: found["rank"])
    assert [found["checkpoint"] for found in output] == ["checkpoint-1", "checkpoint-1"]
    for found in output:
        ((name, reason),) = found["passed_over"]
        assert name == "checkpoint-2.broken" and reason.startswith("state/rank1.pt: sha256 ")


def test_a_node_with_another_view_of_the_files_costs_no_checkpoint(tmp_path: Path) -> None:
    require_root()
    assert run_worker("save", str(tmp_path), "1", "2", "1").returncode == 0
    failed = run_worker("resume-with-another-view", str(tmp_path), "checkpoint-1/state/rank1.pt")
    assert failed.returncode != 0
    words = "state/rank1.pt: rank 1 finds 0 bytes, "
    lines = [line for line in failed.stderr.splitlines() if "TrainingFailed" in line and words in line]
    assert len(lines) == 2 and all("rank 0 finds it whole" in line for line in lines), failed.stderr
    assert names_in(tmp_path) == ["checkpoint-1"]


def test_killed_while_it_saves_the_run_goes_on_from_the_one_before(tmp_path: Path) -> None:
    before = save(tmp_path, 2)
    with subprocess.Popen([sys.executable, str(WORKER), "save-slowly", str(tmp_path), "4"]) as process:
        try:
            deadline = time.monotonic() + 60
            while len(list(tmp_path.glob(f"{PARTIAL_NAME}/*/checkpoint-4/state/*.bin"))) < 3:
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.02)
        finally:
            process.send_signal(signal.SIGKILL)
    assert names_in(tmp_path) == [PARTIAL_NAME, "checkpoint-2"]
    found = agree_on_resume(tmp_path, resume="auto", world=ALONE)
    assert (found.checkpoint, found.passed_over) == (before, ())
    save(tmp_path, 4)
    assert names_in(tmp_path) == ["checkpoint-2", "checkpoint-4"], "what the dead one left is gone"


def require_root() -> None:
    if os.geteuid() != 0:
        not_tested("only root can mount")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 24 MB."""
    require_root()
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", folder], check=True)
    try:
        yield folder
    finally:
        # Lazy: the failed writers that pytest keeps in its tracebacks still hold their files open.
        subprocess.run(["umount", "--lazy", folder], check=True)


def test_leftovers_of_a_dead_attempt_that_cannot_be_removed_stop_no_save(tmp_path: Path) -> None:
    require_root()
    held = tmp_path / PARTIAL_NAME / "checkpoint-2-dead" / "held"
    held.mkdir(parents=True)
    # As NFS does for a file that a process still has open: the folder cannot be emptied.
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", held], check=True)
    try:
        assert save(tmp_path, 4) == find_newest_complete(tmp_path)
        assert save(tmp_path, 6) == find_newest_complete(tmp_path)
    finally:
        subprocess.run(["umount", "--lazy", held], check=True)


def test_every_file_that_reaches_the_disk_counts_as_progress(tmp_path: Path) -> None:
    beats: list[None] = []
    with new_checkpoint(tmp_path, step=1, world=ALONE, keep_last=2, beat=lambda: beats.append(None)) as aside:
        (aside / "checkpoint-1").mkdir()
        for n in range(3):
            (aside / "checkpoint-1" / f"{n}.pt").write_bytes(b"w")
    assert len(beats) == 6, "once synced and once hashed, each of three"


def used_bytes(folder: Path) -> int:
    return shutil.disk_usage(folder).used


def test_a_disk_that_fills_up_loses_no_checkpoint_and_names_what_is_needed(small_disk: Path) -> None:
    checkpoints = small_disk / "run" / "checkpoints"
    checkpoints.mkdir(parents=True)
    assert run_worker("save", str(checkpoints), "1", "2").returncode == 0
    before = used_bytes(small_disk)
    # The first time the second rank's part is larger than the whole disk, which cannot be known before.
    failed = run_worker("save", str(checkpoints), "2", "1", "40")
    assert failed.returncode != 0
    assert names_in(checkpoints / PARTIAL_NAME) == [] and used_bytes(small_disk) < before + 100_000
    assert agree_on_resume_of_two(checkpoints) == "checkpoint-1"
    line = next(line for line in failed.stderr.splitlines() if "TrainingFailed" in line and "checkpoint-2 was" in line)
    assert kind_of_message(line) == "disk_full" and str(checkpoints) in line
    assert "it needs about 4.0 MB, as checkpoint-1 did, which is untouched" in line and "MB free" in line
    hint = next(line for line in failed.stderr.splitlines() if "hint: df -h" in line)
    assert f"janus-cluster resume {checkpoints.parent}" in hint and "checkpoint.keep_last" in hint


def agree_on_resume_of_two(checkpoints: Path) -> Any:
    done = run_worker("resume", str(checkpoints))
    assert done.returncode == 0, done.stderr
    return answers(done)[0]["checkpoint"]


def test_what_cannot_fit_is_refused_by_all_ranks_before_anything_is_written(small_disk: Path) -> None:
    assert run_worker("save", str(small_disk), "1", "5").returncode == 0
    (small_disk / "other").write_bytes(b"\0" * 8_000_000)
    failed = run_worker("save", str(small_disk), "2", "5")
    assert failed.returncode != 0
    lines = [line for line in failed.stderr.splitlines() if "TrainingFailed" in line and "No space left" in line]
    assert len(lines) == 2, "each rank reports it"
    for line in lines:
        assert "checkpoint-2 needs about 10.0 MB, as checkpoint-1 did" in line and "Nothing was written" in line
    assert names_in(small_disk) == ["checkpoint-1", "other"]


def write_python(folder: Path) -> None:
    (folder / "state.bin").write_bytes(os.urandom(40_000_000))


def write_torch(folder: Path) -> None:
    torch.save(torch.rand(10_000_000), folder / "state.pt")


def write_many(folder: Path) -> None:
    for n in range(40):
        torch.save(torch.rand(250_000), folder / f"{n}.pt")


@pytest.mark.parametrize("write", [write_python, write_torch, write_many])
def test_every_writer_of_a_full_disk_reports_the_systems_message(
    small_disk: Path, write: Callable[[Path], None]
) -> None:
    save(small_disk, 1)
    with (
        pytest.raises(TrainingFailed, match="No space left on device while checkpoint-2 was written") as failed,
        new_checkpoint(small_disk, step=2, world=ALONE, keep_last=2) as aside,
    ):
        (aside / "checkpoint-2").mkdir()
        write(aside / "checkpoint-2")
    assert failed.value.kind == "disk_full"
    assert names_in(small_disk) == [PARTIAL_NAME, "checkpoint-1"] and names_in(small_disk / PARTIAL_NAME) == []
    assert agree_on_resume(small_disk, resume="auto", world=ALONE).checkpoint == small_disk / "checkpoint-1"


def test_a_full_disk_without_room_for_a_folder_is_reported_too(small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,nr_inodes=2", small_disk], check=True)
    (small_disk / "the-last-inode").touch()
    with (
        pytest.raises(TrainingFailed, match="No space left on device: not even a folder for checkpoint-1"),
        new_checkpoint(small_disk, step=1, world=ALONE, keep_last=2),
    ):
        raise AssertionError("nothing is written")


def test_a_run_folder_that_was_moved_is_not_made_anew(tmp_path: Path) -> None:
    with pytest.raises(TrainingFailed, match=r"the run folder .*/run is gone: checkpoint-8 was not written") as caught:
        save(tmp_path / "run" / "checkpoints", 8)
    assert caught.value.kind == "file_system" and not (tmp_path / "run").exists()


def test_an_error_that_follows_another_ranks_full_disk_is_no_cause_of_its_own(tmp_path: Path) -> None:
    with (
        pytest.raises(TrainingFailed, match="another rank gave up checkpoint-2; here: FileNotFoundError") as failed,
        new_checkpoint(tmp_path, step=2, world=ALONE, keep_last=2) as aside,
    ):
        shutil.rmtree(aside)
        (aside / "checkpoint-2").mkdir()
    assert failed.value.is_follow_up


@pytest.mark.parametrize("profile", ["zero2", "zero3"])
def test_a_gradient_that_is_no_number_is_not_saved(tmp_path: Path, profile: str) -> None:
    write_demo_episodes(tmp_path / "demo", num_episodes=2, seed=1, image_size=(160, 120))
    job = {
        "nodes": 1,
        "hardware": CPU["hardware"] | {"processes_per_node": 2},
        "model": {"preset": "tiny"},
        "data": {
            "roots": [str(tmp_path / "demo")], "history": 1, "image_width": 84, "min_pixels": 784, "num_workers": 0,
            "validation_fraction": 0,
        },
        "training": {"per_device_batch_size": 1, "gradient_accumulation_steps": 2, "max_steps": 3, "precision": "fp32"},
        "deepspeed": {"profile": profile},
        "checkpoint": {"every_steps": 1},
    }  # fmt: skip
    run = write_run_folder(tmp_path / "run", job)
    failed = run_worker(str(run.path), worker=WORKER.with_name("spoilt_gradient_worker.py"))
    assert failed.returncode != 0
    line = next(line for line in failed.stderr.splitlines() if "TrainingFailed: " in line)
    assert "the loss's gradient norm is not finite at step 2" in line
    # torchrun ends the other rank as soon as one has failed.
    kinds = {RankFailure.require(path).kind for path in run.rank_failures(1)}
    assert kinds == {"diverged"}
    assert names_in(run.checkpoints) == ["checkpoint-1"]
    manifest = read_json(run.checkpoints / "checkpoint-1" / "manifest.json")
    about = ("world_size", "zero_stage", "processes_per_node", "effective_batch_size")
    assert [manifest[key] for key in about] == [2, int(profile[-1]), 2, 4]
    state = (run.checkpoints / "checkpoint-1" / "trainer_state.json").read_text()
    assert PARTIAL_NAME not in state, "no path of the time of writing"


@pytest.mark.parametrize(("took_s", "wanted"), [(119.0, None), (120.0, 480), (200.0, 840)])
def test_a_checkpoint_that_takes_half_of_a_stops_time_is_a_warning_with_what_to_type(
    took_s: float, wanted: int | None
) -> None:
    output = warn_of_slow_save(took_s, limit_s=240)
    if wanted is None:
        assert output is None
    else:
        assert output is not None
        assert f"--set restart.stop_timeout_s={wanted} --set slurm.signal=B:USR1@{wanted + 60}" in output
