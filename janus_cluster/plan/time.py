"""Expected seconds of an optimizer step: computing, what of communication stays visible, the optimizer. No torch.

All of it is prediction; docs/performance.md names the assumptions and what they were compared with.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from janus_cluster.job.schema import Data
from janus_cluster.modelspec.sizes import Sizes, preset_sizes
from janus_cluster.plan.flops import Flops, Work, count_flops
from janus_cluster.plan.hardware import ASSUMED, Assumptions, Gpu, known_gpus
from janus_cluster.plan.sample import Sample, plan_sample
from janus_cluster.plan.setup import Setup

# Modules whose hooks run in one pass: a language layer is itself, two norms, attention with four projections, the MLP
# with three and its activation; a vision block likewise, with one projection for queries, keys and values.
LAYER_MODULES = 13
BLOCK_MODULES = 11

# The one run that was logged before: 7B, ZeRO-3, one node of 8 H800, 8 micro-steps of one padded sample a rank, VGGT
# registered in the engine and run frame by frame.
LOGGED_STEP_S = 54.7
LOGGED_VGGT_CALLS = 11_936


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of one optimizer step. `communication` is on the wire, `exposed` what of it is waited for."""

    compute: float
    hooks: float
    communication: float
    exposed: float
    optimizer: float
    waiting: float

    @property
    def total(self) -> float:
        return self.compute + self.hooks + self.exposed + self.optimizer + self.waiting


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Payloads in bytes; `gather_*` and `reduce` are per micro-step, the rest per optimizer step."""

    gather_forward: float = 0.0
    gather_backward: float = 0.0
    reduce: float = 0.0
    reduce_step: float = 0.0
    gather_step: float = 0.0
    # An all-reduce moves its payload twice over the bus, a gather or a reduce-scatter once.
    reduce_passes: int = 2


def plan_traffic(sizes: Sizes, setup: Setup) -> Traffic:
    """What the ranks exchange.

    ZeRO-0: the gradients once a step. ZeRO-1: the same, then the new weights are gathered. ZeRO-2: gradients at every
    micro-step (DeepSpeed 0.19 all-reduces the buckets and keeps its part), weights gathered once. ZeRO-3: all weights
    before the forward pass of every micro-step, and once more those that the backward pass goes through, frozen ones
    too; then a reduce-scatter. Equal to the byte to what the engines send (tests/janusvln/test_plan_traffic.py).
    """
    e, work = setup.element_bytes, setup.work
    trained = float(e * sizes.trained_parameters(work.tune, work.lora))
    if setup.world_size == 1:
        return Traffic()
    if setup.stage == 3:
        whole = float(e * sizes.engine_parameters(work.lora))
        backward = whole - e * _without_backward(sizes, work) if work.reaches_language else 0.0
        return Traffic(gather_forward=whole, gather_backward=backward, reduce=trained, reduce_passes=1)
    if setup.stage == 2:
        return Traffic(reduce=trained, gather_step=trained)
    return Traffic(reduce_step=trained, gather_step=trained if setup.stage else 0.0)


def _without_backward(sizes: Sizes, work: Work) -> int:
    """Parameters of frozen modules before which nothing learns: no gradient passes through them."""
    tune = work.tune
    learns = {"vision": tune.vision, "projector": tune.projector or tune.vision, "vggt_merger": tune.vggt_merger}
    return sum(sizes.parameters[part] for part, is_passed in learns.items() if not is_passed)


def plan_step(
    sizes: Sizes, sample: Sample, setup: Setup, gpu: Gpu, *, vggt_calls: int = 0, assumed: Assumptions = ASSUMED
) -> StepTime:
    """The time of one optimizer step. `vggt_calls`: module calls of a VGGT inside the engine, 0 where it is outside."""
    flops = count_flops(sizes, sample, setup.work)
    rate = gpu.peak_tflops * 1e12 * assumed.efficiency
    compute = setup.accumulation * setup.micro_batch * flops.total / rate
    on_wire, exposed = _communication(sizes, setup, flops, gpu, assumed)
    hooks = setup.accumulation * _hook_time(sizes, setup, flops, rate=rate, vggt_calls=vggt_calls, assumed=assumed)
    busy = compute + hooks
    return StepTime(
        compute=compute,
        hooks=hooks,
        communication=on_wire,
        exposed=exposed,
        optimizer=_optimizer_time(sizes, setup, gpu, assumed),
        waiting=busy * assumed.straggler * math.log2(setup.world_size),
    )


def _hook_time(
    sizes: Sizes, setup: Setup, flops: Flops, *, rate: float, vggt_calls: int, assumed: Assumptions
) -> float:
    """Seconds of a micro-step in which the GPU waits for ZeRO-3's hooks on the host.

    Launching goes on while the GPU computes, so within VGGT and within the rest the longer of the two counts.
    """
    if setup.stage != 3:
        return 0.0
    passes = 1 + int(setup.work.reaches_language)
    layers = sizes.language.layers * LAYER_MODULES
    calls = sizes.vision.depth * BLOCK_MODULES + layers * passes
    if setup.work.recompute_every:
        calls += layers // setup.work.recompute_every
    samples = setup.micro_batch
    in_vggt, in_rest = samples * flops.vggt / rate, samples * (flops.total - flops.vggt) / rate
    host_vggt, host_rest = vggt_calls * samples * assumed.module_call_s, calls * assumed.module_call_s
    return max(0.0, host_vggt - in_vggt) + max(0.0, host_rest - in_rest)


def _communication(sizes: Sizes, setup: Setup, flops: Flops, gpu: Gpu, assumed: Assumptions) -> tuple[float, float]:
    """Seconds on the wire in a step, and those of them that nothing hides.

    Hidden at most: the given share of a collective, and not longer than the computing beside it. The gathering of new
    weights after the optimizer has nothing beside it.
    """
    traffic = plan_traffic(sizes, setup)
    seconds = 1 / (gpu.bus_gb_per_s(setup.nodes, setup.ranks_per_node) * 1e9)
    share = (setup.world_size - 1) / setup.world_size * seconds
    rate = gpu.peak_tflops * 1e12 * assumed.efficiency
    backward_s = setup.micro_batch * (flops.backward + flops.head) / rate
    forward_s = setup.micro_batch * (flops.total - flops.backward - flops.head) / rate
    behind_forward = traffic.gather_forward * share
    behind_backward = (traffic.gather_backward + traffic.reduce * traffic.reduce_passes) * share
    at_end = traffic.reduce_step * traffic.reduce_passes * share
    after = traffic.gather_step * share
    can_hide = assumed.hidden if setup.overlap else 0.0
    exposed = setup.accumulation * (
        _exposed(behind_forward, forward_s, can_hide) + _exposed(behind_backward, backward_s, can_hide)
    )
    exposed += _exposed(at_end, backward_s, can_hide) + after
    return setup.accumulation * (behind_forward + behind_backward) + at_end + after, exposed


def _exposed(seconds: float, beside_s: float, can_hide: float) -> float:
    return max(seconds * (1 - can_hide), seconds - beside_s)


def _optimizer_time(sizes: Sizes, setup: Setup, gpu: Gpu, assumed: Assumptions) -> float:
    """AdamW over this rank's part, bound by memory; offloaded: by the host's memory, which a node's ranks share."""
    trained = sizes.trained_parameters(setup.work.tune, setup.work.lora)
    share = trained / (setup.world_size if setup.stage else 1)
    if not setup.offload_optimizer:
        return share * assumed.optimizer_bytes / (gpu.hbm_gb_per_s * 1e9)
    on_node = share * setup.ranks_per_node
    over_pcie = 2 * setup.element_bytes * share / (assumed.pcie_gb_per_s * 1e9)
    return on_node * assumed.host_optimizer_bytes / (assumed.host_gb_per_s * 1e9) + over_pcie


def predecessor_step(assumed: Assumptions = ASSUMED) -> StepTime:
    """This model's prediction for the predecessor's logged run: 54.7 s a step of 64 samples."""
    setup = Setup(
        nodes=1, ranks_per_node=8, stage=3, offload_optimizer=False, offload_parameters=False, micro_batch=1,
        accumulation=8, element_bytes=2, live_parameters=1_000_000_000,
        work=Work(whole_recompute=True, whole_vggt=True, head_on_all=True),
    )  # fmt: skip
    sample = plan_sample(Data(image_mode="pad"))
    sizes = preset_sizes("qwen2.5-vl-7b")
    return plan_step(sizes, sample, setup, known_gpus()["h800"], vggt_calls=LOGGED_VGGT_CALLS, assumed=assumed)
