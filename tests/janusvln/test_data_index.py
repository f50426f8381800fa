"""The index: built once by one rank, kept, renewed when the data changes, small, and the same for every reader."""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
from data_files import FRAME, write_episodes, write_json, write_r2r

from janus_cluster.errors import TrainingFailed, UsageError
from janus_cluster.janusvln.data.formats.source import Source
from janus_cluster.janusvln.data.index import SampleSplit, load_samples
from janus_cluster.janusvln.data.index_tasks import read_units, stamp_folders
from janus_cluster.janusvln.data.indexing import Reporter, Share
from janus_cluster.janusvln.data.old_indexes import remove_old_indexes
from janus_cluster.janusvln.data.pool import run_tasks
from janus_cluster.janusvln.data.store import Store, load_store
from janus_cluster.job.schema import Data


def load(root: Path, index_dir: Path | None, lines: list[str] | None = None, **keys: Any) -> SampleSplit:
    data = Data(roots=[str(root)], validation_fraction=0, max_bad_fraction=1)
    reporter = None if lines is None else Reporter(report=lines.append)
    return load_samples(data.model_copy(update=keys), seed=0, index_dir=index_dir, reporter=reporter)


def was_read(lines: list[str]) -> bool:
    """Did the last loading read the data, or check the index only?"""
    assert " read in " in lines[-1] or "index checked in" in lines[-1]
    return " read in " in lines[-1]


def test_the_second_loading_reads_the_index_and_gives_the_same_samples(tmp_path):
    root = write_episodes(tmp_path / "data")
    lines: list[str] = []
    first, second = (load(root, tmp_path / "index", lines) for _ in range(2))
    assert ["by 1 process" in line for line in lines] == [True, False]
    assert "12 samples, index checked" in lines[1]
    assert list(first.train) == list(second.train) == list(load(root, None).train)
    assert list(load(root, tmp_path / "index", history=1).train) == list(load(root, None, history=1).train)


def edit_description(root: Path) -> None:
    path = next((root / "ep_1").glob("step_0001_*.json"))
    path.write_text(path.read_text().replace("sofa", "rug"))


def add_episode(root: Path) -> None:
    shutil.copytree(root / "ep_0", root / "ep_9")


def remove_frame(root: Path) -> None:
    next((root / "ep_2").glob("step_0003_*.png")).unlink()


def touch_frame(root: Path) -> None:
    os.utime(next((root / "ep_2").glob("step_0003_*.png")), ns=(1, 1))


@pytest.mark.parametrize("change", [edit_description, add_episode, remove_frame, touch_frame])
def test_the_index_is_made_anew_when_an_episode_changes(tmp_path, change):
    root = write_episodes(tmp_path / "data")
    lines: list[str] = []
    load(root, tmp_path / "index", lines)
    change(root)
    split = load(root, tmp_path / "index", lines)
    assert was_read(lines)
    assert list(split.train) == list(load(root, None).train)
    load(root, tmp_path / "index", lines)
    assert not was_read(lines)


def test_the_index_of_a_file_is_made_anew_when_it_or_a_folder_of_frames_changes(tmp_path):
    root = write_r2r(tmp_path / "data")
    lines: list[str] = []
    load(root, tmp_path / "index", lines)
    time.sleep(0.01)  # folders' times of change have the clock's grain
    (root / "1" / "step_9_STOP.png").write_bytes(FRAME)
    assert len(load(root, tmp_path / "index", lines).train) == 13 and was_read(lines)
    records = [{"episode_id": 0, "instruction": {"instruction_text": "Go."}}]
    write_json(root / "train.json.gz", {"episodes": records})
    assert len(load(root, tmp_path / "index", lines).train) == 4 and was_read(lines)


def test_a_damaged_index_is_made_anew(tmp_path):
    root = write_episodes(tmp_path / "data")
    lines: list[str] = []
    load(root, tmp_path / "index", lines)
    (folder,) = (tmp_path / "index").iterdir()
    (folder / "text_blob.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="holds 0 bytes"):
        load_store(folder)
    assert len(load(root, tmp_path / "index", lines).train) == 12
    assert was_read(lines)


def age(folder: Path, days: float) -> Path:
    stamp_s = time.time() - days * 86_400
    os.utime(folder, (stamp_s, stamp_s))
    return folder


@pytest.mark.parametrize(
    ("ages_days", "num_kept"), [((29, 31, 32, 33, 34, 35, 36, 37), 4), ((1, 1, 1, 1, 1, 29, 31, 400), 6)]
)
def test_indexes_unused_for_a_month_are_removed_but_for_the_newest(tmp_path, ages_days, num_kept):
    root = write_episodes(tmp_path / "data")
    lines: list[str] = []
    load(root, tmp_path / "index", lines)
    (used,) = (tmp_path / "index").iterdir()
    others = [shutil.copytree(used, tmp_path / "index" / f"{i:016x}-{i:016x}") for i in range(8)]
    foreign = [shutil.copytree(used, tmp_path / "index" / name) for name in ("mine", ".building-x", ".building-y")]
    for folder, days in zip(others, ages_days, strict=True):
        age(folder, days)
    for folder, days in zip([used, *foreign], (400, 400, 400, 1), strict=True):
        age(folder, days)
    load(root, tmp_path / "index", lines)
    # The one that is used now is the newest: four more are kept, however old they are.
    assert set((tmp_path / "index").iterdir()) == {used, *others[:num_kept], foreign[0], foreign[2]}
    assert sum("was not used for 30 days: removed" in line for line in lines) == len(others) - num_kept
    load(root, tmp_path / "index", lines)
    assert not was_read(lines)


def test_an_old_index_that_another_process_has_mapped_can_still_be_read(tmp_path):
    split = load(write_episodes(tmp_path / "data"), tmp_path / "index")
    (used,) = (tmp_path / "index").iterdir()
    mapped = load_store(used)
    for i in range(5):
        shutil.copytree(used, tmp_path / "index" / f"{i:016x}-{i:016x}")
    age(used, 31)
    assert remove_old_indexes(tmp_path / "index") == [used]
    assert not used.exists()
    assert mapped.episode_names() == ["ep_0", "ep_1", "ep_2"]
    assert [sample.episode for sample in split.train][::4] == ["ep_0", "ep_1", "ep_2"]


def test_one_rank_reads_and_the_others_open_what_it_wrote(tmp_path):
    root = write_episodes(tmp_path / "data")
    sent: list[Any] = []

    def send(value: Any) -> Any:
        sent.append(value)
        return value

    data = Data(roots=[str(root)], validation_fraction=0)
    keys: dict[str, Any] = {"seed": 0, "index_dir": tmp_path / "index"}
    builder = load_samples(data, **keys, share=Share(True, send))
    lines: list[str] = []
    received = iter(sent)
    other = load_samples(
        data, **keys, share=Share(False, lambda _: next(received)), reporter=Reporter(report=lines.append)
    )
    assert list(builder.train) == list(other.train)
    assert lines == [], "nothing was read"


def test_a_failure_of_the_builder_is_every_ranks_error(tmp_path):
    (tmp_path / "data.json").write_text("{")
    data = Data(roots=[str(tmp_path / "data.json")])
    sent: list[Any] = []

    def broadcast(value: Any) -> Any:
        sent.append(value)
        return pickle.loads(pickle.dumps(sent[0]))

    for is_builder in (True, False):
        with pytest.raises(UsageError, match="cannot be read as JSON") as caught:
            load_samples(data, seed=0, index_dir=tmp_path / "index", share=Share(is_builder, broadcast))
        assert caught.value.hint


def test_an_index_that_another_node_cannot_see_shows_what_to_set(tmp_path):
    data = Data(roots=[str(write_episodes(tmp_path / "data"))])
    share = Share(False, lambda _: [str(tmp_path / "elsewhere")])
    with pytest.raises(UsageError, match="not readable here") as caught:
        load_samples(data, seed=0, index_dir=tmp_path / "index", share=share)
    assert "data.index_dir" in str(caught.value.hint)


def test_a_table_is_pickled_by_its_folder(tmp_path):
    root = write_episodes(tmp_path / "data", episodes=40, steps=8)
    kept = load(root, tmp_path / "index").train
    loose = load(root, None).train
    assert len(pickle.dumps(kept)) < len(pickle.dumps(loose)) / 3
    for table in (kept, loose):
        assert list(pickle.loads(pickle.dumps(table))) == list(table)


def test_a_table_is_a_sequence(tmp_path):
    table = load(write_episodes(tmp_path), None).train
    assert [s.id for s in table[2:9:3]] == [table[i].id for i in (2, 5, 8)]
    assert table[-1] == table[len(table) - 1] == list(table)[-1]
    with pytest.raises(IndexError):
        table[len(table)]
    assert table.root_index.tolist() == [0] * 12


def test_roots_are_numbered_in_the_jobs_order(tmp_path):
    write_episodes(tmp_path / "b", episodes=1, prefix="b")
    write_r2r(tmp_path / "a", episodes=2)
    roots = [{"path": str(tmp_path / "b"), "weight": 3}, {"path": str(tmp_path / "a")}]
    split = load_samples(Data(roots=roots, validation_fraction=0.34), seed=0)
    for table in (split.train, split.held_out):
        assert [0 if s.episode.startswith("b") else 1 for s in table] == table.root_index.tolist()
    assert len(split.train) + len(split.held_out) == 12


@pytest.mark.slow
def test_processes_give_what_this_process_gives(tmp_path):
    root = write_episodes(tmp_path / "data", episodes=8)
    names = sorted(folder.name for folder in root.iterdir())
    stamps = [partial(stamp_folders, root, names[i : i + 2]) for i in range(0, 8, 2)]
    assert list(run_tasks(stamps, 2)) == list(run_tasks(stamps, 1))
    source = Source(path=root, format="episodes")
    reads = [partial(read_units, source, names[i : i + 2]) for i in range(0, 8, 2)]
    here, there = ([list(Store(columns).text(0)) for columns in run_tasks(reads, n)] for n in (1, 2))
    assert here == there


@pytest.mark.slow
def test_results_are_taken_one_by_one_and_no_more_tasks_than_keep_the_processes_busy():
    taken = []

    def tasks():
        for n in range(1000):
            taken.append(n)
            yield partial(pow, n, 2)

    results = run_tasks(tasks(), 2)
    assert [next(results) for _ in range(20)] == [n**2 for n in range(20)]
    assert len(taken) <= 20 + 2 * 2
    results.close()


@pytest.mark.slow
def test_a_process_that_dies_is_reported_as_such():
    with pytest.raises(TrainingFailed, match="process that reads the data died"):
        list(run_tasks([partial(pow, 2, 2), partial(os._exit, 3), partial(pow, 2, 3)], 2))


def is_alive(pid: str) -> bool:
    try:
        return psutil.Process(int(pid)).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.slow
def test_processes_do_not_import_the_program_that_starts_them_and_end_with_it(tmp_path):
    program = tmp_path / "program" / "__main__.py"
    program.parent.mkdir()
    program.write_text(
        "import os, sys, time\nfrom functools import partial\nfrom janus_cluster.janusvln.data.pool import run_tasks\n"
        "print('imported', flush=True)\nresults = run_tasks([os.getpid, os.getpid, partial(time.sleep, 600)], 2)\n"
        "print(*{next(results), next(results)}, flush=True)\nos.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "program"], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
    )
    imported, pids = done.stdout.splitlines()
    assert (imported, done.returncode) == ("imported", -9), done.stderr
    deadline = time.monotonic() + 60
    while any(map(is_alive, pids.split())) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(is_alive, pids.split()))


@pytest.mark.slow
def test_many_tiny_episodes_are_read_by_several_processes_in_the_same_order(tmp_path):
    root = tmp_path / "data"
    write_episodes(root, episodes=1, steps=1)
    for i in range(1, 2_400):
        folder = root / f"ep_{i}"
        folder.mkdir()
        for file in (root / "ep_0").iterdir():
            os.link(file, folder / file.name)
    (root / "ep_77" / "milestones_result.json").unlink()
    lines: list[str] = []
    split = load(root, tmp_path / "index", lines)
    processes = min(2, len(os.sched_getaffinity(0)))
    assert f"by {processes} process" in lines[-1]
    assert [s.episode for s in split.train] == sorted(f"ep_{i}" for i in range(2_400) if i != 77)
    assert split.num_bad == 1
    size = sum(file.stat().st_size for file in (tmp_path / "index").rglob("*"))
    assert size / len(split.train) < 600, "bytes a sample"


def test_a_broken_link_hides_no_change_of_the_files_beside_it(tmp_path):
    root = write_episodes(tmp_path / "data")
    (root / "ep_0" / "link").symlink_to("nowhere")
    load(root, tmp_path / "index")
    write_json(
        root / "ep_0" / "step_0000_MOVE_FORWARD.json", {"landmark_description": "New.", "spatial_description": "x"}
    )
    lines: list[str] = []
    load(root, tmp_path / "index", lines)
    assert was_read(lines)


def test_an_index_that_vanishes_while_it_is_looked_for_is_none(tmp_path):
    root, index_dir = write_episodes(tmp_path / "data"), tmp_path / "index"
    load(root, index_dir)
    (kept,) = index_dir.iterdir()
    (index_dir / f"{kept.name.partition('-')[0]}-0000").symlink_to("nowhere")
    lines: list[str] = []
    load(root, index_dir, lines)
    assert not was_read(lines)


def test_other_users_may_read_an_index_whatever_the_umask(tmp_path):
    before = os.umask(0o077)
    try:
        load(write_episodes(tmp_path / "data"), tmp_path / "index")
    finally:
        os.umask(before)
    (folder,) = (tmp_path / "index").iterdir()
    assert folder.stat().st_mode & 0o777 == 0o755
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o644}


def test_an_index_that_the_file_system_cannot_read_just_now_is_not_removed(tmp_path):
    root, index_dir = write_episodes(tmp_path / "data"), tmp_path / "index"
    load(root, index_dir)
    (kept,) = index_dir.iterdir()
    (kept / "text_blob.bin").unlink()
    (kept / "text_blob.bin").symlink_to("text_blob.bin")  # ELOOP: an error of the file system's, also for root
    with pytest.raises(UsageError, match="the data cannot be indexed"):
        load(root, index_dir)
    assert (kept / "complete.json").is_file()


def test_a_broken_frame_that_is_mended_in_place_is_read_again(tmp_path):
    root = write_r2r(tmp_path / "data")
    frame = root / "0" / "step_1_TURN_LEFT.png"
    frame.write_bytes(FRAME[:-20])
    assert load(root, tmp_path / "index").num_bad == 3
    frame.write_bytes(FRAME)
    assert load(root, tmp_path / "index").num_bad == 0


def test_a_change_that_keeps_size_and_time_is_noticed(tmp_path):
    root = write_episodes(tmp_path / "data")
    load(root, tmp_path / "index")
    frame = root / "ep_0" / "step_0000_MOVE_FORWARD.png"
    facts = frame.stat()
    frame.write_bytes(FRAME[:-1] + b"x")
    os.utime(frame, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    assert load(root, tmp_path / "index").num_bad > 0
