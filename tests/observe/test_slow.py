"""The slow GPU, link and rank, named with what they cost; and what is held against a node."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from janus_cluster.observe.progress import Progress, build_progress
from janus_cluster.observe.slow import judge_gpus, judge_links, judge_ranks, load_slow, throttled_gpus
from janus_cluster.run.paths import RunDir
from janus_cluster.run.records.health import GpuSample, HealthSample
from janus_cluster.run.records.metrics import TrainEvent

BEGUN = 1_700_000_000.0
CAP, IDLE, THERMAL = 0x4, 0x1, 0x40


def samples(*own: Sequence[tuple[float, int]]) -> list[HealthSample]:
    """One sample every 30 s; each of its pairs is a GPU's clock and reasons."""
    return [
        HealthSample(
            time=BEGUN + 30 * i,
            gpus=tuple(GpuSample(gpu=g, sm_mhz=mhz, reasons=bits) for g, (mhz, bits) in enumerate(row)),
        )
        for i, row in enumerate(own)
    ]


SOUND = samples(*[[(1400, CAP)] * 4] * 20)


def with_gpu_3(mhz: float, bits: int, *, of: int = 20, last: int = 20) -> dict[str, list[HealthSample]]:
    rows = [[(1400.0, CAP)] * 3 + [(mhz, bits) if i >= of - last else (1400.0, CAP)] for i in range(of)]
    return {"node-1": SOUND, "node-2": samples(*rows)}


@pytest.mark.parametrize(("mhz", "is_slow"), [(1330.0, False), (1329.0, True), (1400.0, False)])
def test_a_clock_5_percent_below_the_others_is_slow(mhz: float, is_slow: bool) -> None:
    found = judge_gpus(with_gpu_3(mhz, CAP))
    assert [(slow.node, slow.gpu) for slow in found] == ([("node-2", 3)] if is_slow else [])


def test_the_message_has_reason_clock_time_and_cost() -> None:
    (slow,) = judge_gpus(with_gpu_3(1288, CAP, last=12))
    since = BEGUN + 8 * 30
    assert slow.since == since and slow.cost_share == pytest.approx(0.08)
    clock = time.strftime("%H:%M", time.localtime(since))
    assert slow.message == (
        f"node-2 GPU 3: SW power cap, SM clock 1288 MHz (the others: 1400), since {clock} (5 min): up to 8% of a step"
    )


def test_what_the_hardware_slows_down_is_named_at_any_clock() -> None:
    (slow,) = judge_gpus(with_gpu_3(1390, THERMAL))
    assert slow.message.startswith("node-2 GPU 3: HW thermal slowdown, SM clock 1390 MHz")
    assert slow.cost_share is None
    assert judge_gpus(with_gpu_3(1390, THERMAL, last=4)) == [], "four samples of ten are a moment"


def test_all_gpus_at_their_power_limit_are_sound_and_an_idle_one_proves_nothing() -> None:
    assert judge_gpus({"node-1": SOUND}) == []
    assert judge_gpus(with_gpu_3(345, IDLE)) == []
    assert judge_gpus({}) == [] == judge_gpus({"node-1": SOUND[:2]})
    unknown = [HealthSample(time=1.0, gpus=(GpuSample(gpu=0), GpuSample(gpu=1)))] * 5
    assert judge_gpus({"node-1": unknown}) == []


def test_only_counters_that_still_grow_are_named() -> None:
    def of(*errors: int) -> list[HealthSample]:
        return [HealthSample(time=1.0, link_errors={"mlx5_3:1": {"symbol_error": n}} if n else {}) for n in errors]

    (slow,) = judge_links({"node-1": of(0, 0, 0), "node-2": of(0, 5, 12)})
    assert slow.message == "node-2 mlx5_3:1: symbol_error +12 since training began, still growing"
    assert judge_links({"node-2": of(*[12] * 11)}) == []
    assert judge_links({"node-2": of(3)}) == []


def progress(*joined: float, data: Sequence[float] = (), step_s: float = 10.0) -> Progress:
    ranks = {"first_collective_s": joined, "data_wait_s": tuple(data)}
    return Progress(attempt=1, median_step_time_s=step_s, median_ranks=ranks)


@pytest.mark.parametrize(("last_s", "is_slow"), [(0.39, False), (0.40, True), (0.9, True)])
def test_a_rank_that_is_late_by_3_percent_of_a_step_is_named(last_s: float, is_slow: bool) -> None:
    found = judge_ranks(progress(0.1, 0.1, 0.1, last_s), {3: "node-2"})
    assert [slow.rank for slow in found] == ([3] if is_slow else [])


def test_a_late_rank_is_named_with_its_cause_and_cost() -> None:
    (slow,) = judge_ranks(progress(0.1, 0.9), {1: "node-2"})
    assert slow.message == (
        "rank 1 on node-2 is the last to a step's first collective (not waiting for data): the others wait 0.80 s, "
        "8% of a step"
    )
    (slow,) = judge_ranks(progress(0.1, 0.9, data=(0.0, 0.8)), {})
    assert "rank 1 is the last to a step's first collective (waiting for data)" in slow.message
    nan = float("nan")
    for nothing in (Progress(), progress(0.5), progress(nan, nan), progress(0.1, 0.9, step_s=0.0)):
        assert judge_ranks(nothing, {}) == []


def test_one_disturbed_step_names_no_rank() -> None:
    steps = [
        TrainEvent(attempt=1, step=i, step_time_s=10.0, ranks={"first_collective_s": [0.1, 9.0 if i == 3 else 0.2]})
        for i in range(4)
    ]
    assert judge_ranks(build_progress(steps), {}) == []
    assert build_progress(steps).median_ranks == {"first_collective_s": (0.1, 0.2)}


def test_the_samples_of_the_run_folder_are_judged_and_a_node_without_samples_is_not_sound(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.health_jsonl(1, "a").parent.mkdir(parents=True)
    for node, taken in with_gpu_3(1260, THERMAL).items():
        for sample in taken:
            sample.append(run.health_jsonl(1, node))
    with run.health_jsonl(1, "node-2").open("a") as f:
        f.write('torn\n{"time": "x"}\n{"ti')
    HealthSample(time=1.0, problem="nvidia-smi did not answer within 20 s").append(run.health_jsonl(1, "node-3"))
    found = load_slow(run, 1, progress(0.1, 0.5), {})
    assert [slow.kind for slow in found] == ["gpu", "rank", "unknown"], "the dearest first"
    assert found[2].message == "node-3: its GPUs are not sampled: nvidia-smi did not answer within 20 s"
    assert load_slow(run, None, Progress(), {}) == () == load_slow(run, 2, Progress(), {})


def test_a_node_is_blamed_for_what_its_hardware_did_for_half_of_ten_minutes() -> None:
    found = throttled_gpus(with_gpu_3(1400, THERMAL, of=20, last=10))
    assert found == {"node-2": (BEGUN + 19 * 30, "GPU 3: HW thermal slowdown in 10 of 20 samples while it trained")}
    assert throttled_gpus(with_gpu_3(1400, THERMAL, of=20, last=9)) == {}
    assert throttled_gpus(with_gpu_3(1400, THERMAL, of=19, last=19)) == {}
    assert throttled_gpus(with_gpu_3(1000, CAP)) == {}, "a power cap is the site's"
