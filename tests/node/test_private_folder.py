"""The ranks' own temporary folder, and the process that removes it after them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from janus_cluster.node.caches import cache_variables
from janus_cluster.node.child import exit_code
from janus_cluster.node.temporary import make_private_folder, remove_private_folder
from janus_cluster.run.paths import RunDir

PATIENCE_S = 30


@pytest.fixture
def too_long(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / ("x" * 100)
    folder.mkdir()
    yield folder


def test_ranks_get_a_short_private_folder_with_their_caches_where_the_path_is_too_long(too_long: Path) -> None:
    private = make_private_folder({"TMPDIR": str(too_long)})
    assert private is not None
    folder = Path(private.value)
    try:
        assert len(str(folder)) < 40 and folder.stat().st_mode & 0o777 == 0o700
        assert str(too_long) in private.reason and "AF_UNIX path too long" in private.reason
        caches = cache_variables({private.name: private.value})
        assert len(caches) == 3 and all(Path(cache.value).is_relative_to(folder) for cache in caches)
    finally:
        remove_private_folder(private)
    assert not folder.exists()


def test_a_folder_that_serves_is_kept() -> None:
    assert make_private_folder({"TMPDIR": "/tmp"}) is None


@pytest.mark.train
def test_eval_runs_in_such_a_folder_and_leaves_none(too_long: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    environ = os.environ | {"TMPDIR": str(too_long)}
    argv = [sys.executable, "-m", "janus_cluster.cli", "eval", str(model), "--data", str(tmp_path)]
    done = subprocess.run(argv, env=environ, cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode != 0, "it is no model"
    folder = done.stderr.split("TMPDIR=", 1)[1].split(maxsplit=1)[0]
    assert len(folder) < 40 and not Path(folder).exists()
    assert list(too_long.iterdir()) == []


PARENT = """
import os, sys
from janus_cluster.node.child import exit_code, start_child
child = start_child([sys.executable, "-c", sys.argv[1]], os.environ)
print(child.pid, flush=True)
sys.exit(exit_code(child.wait()))
"""


def start_parent(code: str) -> tuple[subprocess.Popen[str], int, str]:
    """A process with a child that runs `code`; the child's pid and its first line."""
    parent = subprocess.Popen([sys.executable, "-c", PARENT, code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    lines = [parent.stdout.readline(), parent.stdout.readline()]
    (pid,) = (line for line in lines if line.strip().isdigit())
    return parent, int(pid), next(line for line in lines if line != pid)


WAITING = "import time; print('ready', flush=True); time.sleep(60)"


def ends_within(pid: int, limit_s: float) -> bool:
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        state = Path(f"/proc/{pid}/stat")
        if not state.exists() or state.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            return True
        time.sleep(0.05)
    return False


def test_a_child_does_not_outlive_a_parent_that_is_killed() -> None:
    parent, child, _ = start_parent(WAITING)
    parent.kill()
    parent.communicate()
    assert ends_within(child, PATIENCE_S)


def test_a_stop_signal_is_passed_on_and_the_childs_end_is_the_exit_code() -> None:
    parent, _, _ = start_parent(WAITING)
    parent.send_signal(signal.SIGTERM)
    parent.communicate(timeout=PATIENCE_S)
    assert parent.returncode == exit_code(-signal.SIGTERM) == 128 + signal.SIGTERM


@pytest.mark.train
def test_a_run_under_a_temporary_folder_too_long_for_sockets_trains_with_loaders(too_long: Path) -> None:
    janus = Path(sys.executable).with_name("janus-cluster")
    work = too_long.parent
    environ = os.environ | {"TMPDIR": str(too_long), "JANUS_HOME": str(work / "home")}
    subprocess.run([janus, "demo-data", work / "demo", "--episodes", "4"], env=environ, check=True, capture_output=True)
    sets = [
        "nodes=1", f"data.roots=[{work / 'demo'}]", "data.num_workers=1", "data.image_width=168",
        "training.max_steps=1", "preflight.enabled=false",
    ]  # fmt: skip
    command = [janus, "submit", "demo", "--cluster", "local", "--follow", *(f"--set={value}" for value in sets)]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (run,) = (work / "home" / "runs").glob("demo-*")
    log = RunDir(run).node_log(1, "local-01").read_text(encoding="utf-8")
    folder = log.split("train: TMPDIR=", 1)[1].split(maxsplit=1)[0]
    assert f"train: TRITON_CACHE_DIR={folder}/" in log and not Path(folder).exists()
    assert list(too_long.iterdir()) == []
