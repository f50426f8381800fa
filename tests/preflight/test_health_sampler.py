"""The sampler of a node that trains: real processes over pretend programs and a pretend sysfs."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from node_fixtures import NUM, FakeNode, h800_node

from janus_cluster.node.health import link_errors, start_sampler
from janus_cluster.run.paths import RunDir
from janus_cluster.run.records.health import HealthSample, load_samples

pytestmark = pytest.mark.slow


@pytest.fixture
def node(tmp_path: Path) -> FakeNode:
    return h800_node(tmp_path).write()


def sample(node: FakeNode, folder: Path, is_enough: Callable[[list[HealthSample]], bool]) -> list[HealthSample]:
    """The samples of a sampler that was killed once there were enough."""
    path = folder / "health" / "h800-01.jsonl"
    argv = [sys.executable, "-m", "janus_cluster.node.health", str(os.getpid()), str(path)]
    argv += ["--timeout-s", "2", "--every-s", "0.1", "--sysfs-root", str(node.root)]
    sampler = subprocess.Popen(argv, env=node.environ())
    try:
        wait_until(lambda: is_enough(load_samples(path, most_bytes=1 << 20)))
        assert sampler.poll() is None
    finally:
        sampler.kill()
        sampler.wait()
    return load_samples(path, most_bytes=1 << 20)


def wait_until(is_true: Callable[[], bool], *, limit_s: float = 120) -> None:
    deadline = time.monotonic() + limit_s
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_sample_has_every_gpus_clock_power_temperature_memory_and_reasons(node: FakeNode, tmp_path: Path) -> None:
    first = sample(node, tmp_path, bool)[0]
    assert len(first.gpus) == NUM and first.problem is None and first.link_errors == {}
    gpu = first.gpus[3]
    assert (gpu.gpu, gpu.sm_mhz, gpu.sm_max_mhz) == (3, 1400.0, 1980.0)
    assert (gpu.power_w, gpu.temperature_c, gpu.memory_used_mib, gpu.reasons) == (690.12, 61.0, 70112.0, 4)


def test_link_errors_are_counted_from_the_first_sample_on(node: FakeNode, tmp_path: Path) -> None:
    counter = node.root / "sys/class/infiniband/mlx5_3/ports/1/counters/symbol_error"
    counter.write_text("7\n")

    def grow(samples: list[HealthSample]) -> bool:
        if samples:
            counter.write_text("19\n")
        return bool(samples) and bool(samples[-1].link_errors)

    found = sample(node, tmp_path, grow)
    assert found[0].link_errors == {}
    assert found[-1].link_errors == {"mlx5_3:1": {"symbol_error": 12}}


def test_a_counter_that_was_set_back_is_counted_from_zero() -> None:
    assert link_errors({"p": {"a": 9, "b": 1}}, {"p": {"a": 2, "b": 1, "new": 5}, "q": {"a": 1}}) == {"p": {"a": 2}}


def test_a_program_that_hangs_is_recorded_once_and_run_once(tmp_path: Path) -> None:
    slow = f"#!/bin/sh\necho x >> {tmp_path}/runs\nsleep 60\n"
    node = h800_node(tmp_path, programs={"nvidia-smi": slow}).write()
    found = sample(node, tmp_path, lambda samples: len(samples) > 4)
    assert [s.problem for s in found] == ["nvidia-smi did not answer within 2 s", *[None] * (len(found) - 1)]
    assert (tmp_path / "runs").read_text() == "x\n"


def test_a_driver_without_a_field_is_recorded_once(tmp_path: Path) -> None:
    node = h800_node(tmp_path)
    del node.smi["health"]
    found = sample(node.write(), tmp_path, lambda samples: len(samples) > 4)
    assert "is not a valid field" in (found[0].problem or "")
    assert {s.problem for s in found[1:]} == {None}


def test_a_folder_that_cannot_be_written_is_reported_once_and_ends_nothing(node: FakeNode, tmp_path: Path) -> None:
    (tmp_path / "health").write_text("in the way")
    argv = [sys.executable, "-m", "janus_cluster.node.health", str(os.getpid()), str(tmp_path / "health" / "x.jsonl")]
    argv += ["--timeout-s", "2", "--every-s", "0.1", "--no-gpus", "--sysfs-root", str(node.root)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as sampler:
        assert sampler.stdout is not None
        assert "health: " in sampler.stdout.readline()
        time.sleep(1)
        assert sampler.poll() is None
        sampler.kill()
        assert sampler.stdout.read() == ""


STARTER = """
import sys, time
from pathlib import Path
from janus_cluster.job.resolved import ResolvedJob
from janus_cluster.node.health import start_sampler
from janus_cluster.run.paths import RunDir
resolved = ResolvedJob.model_validate_json(Path(sys.argv[1]).read_text())
run = RunDir(Path(sys.argv[2]))
sampler = start_sampler(run, resolved, attempt=1, node="h800-01")
while not run.health_files(1):
    time.sleep(0.1)
print(sampler.pid, flush=True)
"""


def test_the_sampler_of_a_node_ends_with_its_torchrun(node: FakeNode, tmp_path: Path) -> None:
    (tmp_path / "resolved.json").write_text(node.resolve().model_dump_json())
    # As the attempt has made it; the sampler does not make a run folder anew that was moved away.
    RunDir(tmp_path).attempt_logs(1).mkdir(parents=True)
    argv = [sys.executable, "-c", STARTER, str(tmp_path / "resolved.json"), str(tmp_path)]
    done = subprocess.run(argv, env=node.environ(), stdout=subprocess.PIPE, text=True, timeout=300, check=True)
    wait_until(lambda: not is_running(int(done.stdout)))
    assert list(RunDir(tmp_path).health_files(1)) == ["h800-01"]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_where_the_profile_wants_neither_gpus_nor_links_nothing_is_sampled(tmp_path: Path) -> None:
    resolved = FakeNode(tmp_path, job="demo").resolve()
    assert start_sampler(RunDir(tmp_path), resolved, attempt=1, node="local-01") is None
