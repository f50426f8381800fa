"""What all tests share: the one real Slurm of a session, resolved jobs, and which files `-m` leaves unimported."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Literal, NoReturn

import pytest
from selection import find_marks, selects_nothing

from janus_cluster.job.load import load_job
from janus_cluster.job.resolve import resolve_job
from janus_cluster.job.resolved import ResolvedJob
from janus_cluster.job.resources import jobs_dir
from janus_cluster.plan.auto import plan_memory_keys
from janus_cluster.sandbox import SandboxInfo, down, up
from janus_cluster.sandbox.programs import find_missing

# Before torch is imported: several workers share few cores, and threads that wait for each other spin. With one thread
# a test of a model takes a third of the CPU time.
os.environ.setdefault("OMP_NUM_THREADS", "1")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell that starts the tests in its background ignores Ctrl-C for them, and every program of the tests would too.
    signal.signal(signal.SIGINT, signal.default_int_handler)


class _LeftOut(pytest.Module):
    """A test file of which `-m` selects nothing."""

    def collect(self) -> list[pytest.Item]:
        return []


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    if selects_nothing(parent.config.option.markexpr, find_marks(module_path)):
        return _LeftOut.from_parent(parent, path=module_path)
    return None


def require_slurm(*, accounting: bool = False) -> None:
    """Return only where a real Slurm can be started; with REQUIRE_SLURM=1 its absence is a failure, never a skip."""
    missing = find_missing(accounting=accounting)
    if not missing:
        return
    packages = " ".join(sorted(set(missing.values())))
    not_tested(f"NO REAL SLURM HERE, so this was not tested: {', '.join(missing)} missing. apt-get install {packages}")


def not_tested(message: str) -> NoReturn:
    """The test is skipped with that message; with REQUIRE_SLURM=1, which wants everything tested, it fails."""
    if os.environ.get("REQUIRE_SLURM") == "1":
        pytest.fail(f"REQUIRE_SLURM=1, but: {message}")
    pytest.skip(message)


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


@pytest.fixture(scope="session", autouse=True)
def _no_state_in_the_users_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Without JANUS_HOME, what is remembered of the site is in a folder of the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield


@pytest.fixture(scope="session")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SandboxInfo]:
    """A real two-node Slurm, idle, for the whole session. A test that puts a fault on it heals it."""
    require_slurm()
    home = tmp_path_factory.mktemp("s") / "sandbox"
    # A terminated test run (CI's time limit) must not leave a Slurm behind.
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield up(home)
    finally:
        signal.signal(signal.SIGTERM, before)
        down(home)


ENVIRON = {"MODEL_PATH": "/models/qwen", "VGGT_MODEL_PATH": "/models/vggt", "DATA_ROOT": "/data/r2r"}

Resolve = Callable[..., ResolvedJob]


@pytest.fixture
def resolve() -> Resolve:
    """A shipped job, resolved for a run folder and an environment that the test chooses."""

    def resolved(
        job: str = "train_2node",
        *,
        run_dir: Path = Path("/shared/runs/r"),
        sets: Sequence[str] = (),
        environ: Mapping[str, str] | None = None,
        python: str = sys.executable,
        cluster: Literal["slurm", "sandbox", "local"] = "slurm",
    ) -> ResolvedJob:
        everything = ENVIRON | dict(environ or {})
        loaded, memory = plan_memory_keys(load_job(jobs_dir() / f"{job}.yaml", sets=sets, environ=everything))
        return resolve_job(
            loaded,
            run_dir=run_dir,
            cluster=cluster,
            environ=everything,
            cwd=Path("/shared"),
            python=python,
            memory=memory,
        )

    return resolved


@pytest.fixture(scope="session")
def shellcheck() -> str:
    """The program; its absence is a failure, because an unchecked script is what this guards against."""
    found = shutil.which("shellcheck")
    if found is None:
        pytest.fail("shellcheck is not installed: apt-get install shellcheck")
    return found
