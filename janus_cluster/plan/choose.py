"""Every way to train a job that is worth looking at, what each needs, and which one to take. No torch.

All ways compared train the same: effective batch and sample are kept. Only nodes, ZeRO, micro-batch and
recomputing differ; for each of those the least recomputing that fits is taken.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from janus_cluster.errors import UsageError
from janus_cluster.job.load import with_values
from janus_cluster.job.schema import MOST_NODES, JobConfig
from janus_cluster.modelspec.sizes import Sizes
from janus_cluster.plan.flops import Flops, count_flops
from janus_cluster.plan.hardware import Gpu, assumptions_for
from janus_cluster.plan.memory import GB, Memory, plan_memory
from janus_cluster.plan.sample import Sample, plan_sample
from janus_cluster.plan.setup import Setup
from janus_cluster.plan.time import StepTime, plan_step

PROFILES = ("zero1", "zero2", "zero2_offload", "zero3")
MICRO_BATCHES = (1, 2, 4)
# Every n-th language layer is computed again; 0: none. Least work first: what fits first is taken.
RECOMPUTE_EVERY = (0, 4, 2, 1)
# A way that is faster by less than this is no better: the model is not that exact.
TIE = 0.05

PROFILE = "deepspeed.profile"
MICRO_BATCH = "training.per_device_batch_size"
ACCUMULATION = "training.gradient_accumulation_steps"
RECOMPUTE = "training.gradient_checkpointing"
RECOMPUTE_WHICH = "training.gradient_checkpointing_every"
# What an option decides; everything else of a job is the same in all of them.
DECIDED = (PROFILE, MICRO_BATCH, ACCUMULATION, RECOMPUTE, RECOMPUTE_WHICH)


@dataclass(frozen=True, kw_only=True)
class Option:
    """One way to train, and what it needs. `job` is the job with this way's keys in it."""

    job: JobConfig
    setup: Setup
    sample: Sample
    flops: Flops
    memory: Memory
    time: StepTime
    memory_limit: float

    @property
    def profile(self) -> str:
        return self.job.deepspeed.profile

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.memory_limit

    @property
    def seconds_per_sample(self) -> float:
        return self.time.total / self.setup.effective_batch

    def epoch_hours(self, samples: int) -> float:
        return samples * self.seconds_per_sample / 3600


def plan_option(job: JobConfig, *, sizes: Sizes, ranks_per_node: int, gpu: Gpu) -> Option:
    """Memory and time of `job` with the keys as given. Raises: UsageError for keys that contradict each other."""
    assumed = assumptions_for(job.hardware)
    setup = Setup.of(job, ranks_per_node=ranks_per_node)
    sample = plan_sample(job.data)
    return Option(
        job=job,
        setup=setup,
        sample=sample,
        flops=count_flops(sizes, sample, setup.work),
        memory=plan_memory(sizes, sample, setup),
        time=plan_step(sizes, sample, setup, gpu, assumed=assumed),
        memory_limit=(gpu.memory_gb - assumed.reserve_gb) * GB,
    )


def nodes_to_plan(nodes: int) -> tuple[int, ...]:
    """1, 2, 4, … up to the job's number of nodes, which is among them; at least 1 and 2."""
    doubled = {2**k for k in range(MOST_NODES.bit_length())}
    return tuple(sorted({1, 2, nodes} | {number for number in doubled if number <= nodes}))


def plan_options(job: JobConfig, *, sizes: Sizes, ranks_per_node: int, gpu: Gpu, nodes: Sequence[int]) -> list[Option]:
    """Every combination of nodes, ZeRO profile and micro-batch with the job's effective batch; those that fit first,
    the fastest first.

    Returns: one option per combination, with the least recomputing that fits, or with all of it where none does.
    """
    options = []
    for number in nodes:
        every = all_options(
            job.model_copy(update={"nodes": number}),
            sizes=sizes,
            ranks_per_node=ranks_per_node,
            gpu=gpu,
            batch=wanted_batch(job, ranks_per_node=ranks_per_node),
        )
        for _, same in groupby(every, key=lambda o: (o.profile, o.setup.micro_batch)):
            tried = list(same)
            options.append(next((option for option in tried if option.fits), tried[-1]))
    return sorted(options, key=lambda o: (not o.fits, o.time.total if o.fits else o.memory.total))


def all_options(
    job: JobConfig,
    *,
    sizes: Sizes,
    ranks_per_node: int,
    gpu: Gpu,
    batch: int,
    pinned: Collection[str] = (),
) -> list[Option]:
    """Every way to train the job on its nodes with that effective batch; what is `pinned` is as the job has it.

    Within one profile and micro-batch, least recomputing first.
    """
    ways = _ways(job, world_size=job.nodes * ranks_per_node, batch=batch, pinned=pinned)
    return [plan_option(with_values(job, way), sizes=sizes, ranks_per_node=ranks_per_node, gpu=gpu) for way in ways]


def wanted_batch(job: JobConfig, *, ranks_per_node: int) -> int:
    """`effective_batch_size` of the job, else the product of its numbers."""
    training = job.training
    own = training.per_device_batch_size * training.gradient_accumulation_steps * job.nodes * ranks_per_node
    return training.effective_batch_size or own


def with_wanted_batch(job: JobConfig, *, ranks_per_node: int) -> JobConfig:
    """The job with the accumulation that gives the batch it means: --nodes alone would change it.

    Raises: UsageError where no accumulation does.
    """
    per_step = job.training.per_device_batch_size * job.nodes * ranks_per_node
    batch = wanted_batch(job, ranks_per_node=ranks_per_node)
    if batch % per_step:
        ranks = job.nodes * ranks_per_node
        raise UsageError(
            f"training.effective_batch_size: {batch}: not a multiple of per_device_batch_size "
            f"{job.training.per_device_batch_size} × {ranks} ranks",
            hint="--set training.per_device_batch_size=1"
            if batch % ranks == 0
            else batches_to_type(batch, ranks=ranks),
        )
    update = {"gradient_accumulation_steps": batch // per_step}
    return job.model_copy(update={"training": job.training.model_copy(update=update)})


def batches_to_type(batch: int, *, ranks: int) -> str:
    """The next smaller and the next larger effective batch that the ranks divide, as --set takes them."""
    near = sorted({batch // ranks * ranks, -(-batch // ranks) * ranks} - {0})
    return " or ".join(f"--set training.effective_batch_size={number}" for number in near)


def _ways(
    job: JobConfig, *, world_size: int, batch: int, pinned: Collection[str]
) -> Iterator[dict[str, str | int | bool]]:
    """The keys of each way, in the order of `all_options`."""
    own, training = job.deepspeed.profile, job.training
    profiles = PROFILES if own in PROFILES else (own, *PROFILES)
    micro_batches = sorted({*MICRO_BATCHES, training.per_device_batch_size})
    for profile in [own] if PROFILE in pinned else profiles:
        for micro in [training.per_device_batch_size] if MICRO_BATCH in pinned else micro_batches:
            accumulation, rest = divmod(batch, micro * world_size)
            is_other = ACCUMULATION in pinned and accumulation != training.gradient_accumulation_steps
            if rest or not accumulation or is_other:
                continue
            for every in _recompute_levels(job, pinned):
                yield {
                    PROFILE: profile,
                    MICRO_BATCH: micro,
                    ACCUMULATION: accumulation,
                    RECOMPUTE: every > 0,
                    RECOMPUTE_WHICH: max(1, every),
                }


def _recompute_levels(job: JobConfig, pinned: Collection[str]) -> list[int]:
    training = job.training
    levels = [0, training.gradient_checkpointing_every] if RECOMPUTE_WHICH in pinned else list(RECOMPUTE_EVERY)
    if RECOMPUTE in pinned:
        levels = [every for every in levels if (every > 0) == training.gradient_checkpointing]
    return levels


def choose(options: Sequence[Option], *, nodes: int) -> Option | None:
    """The option to take on `nodes` nodes: the fastest that fits; among those about as fast, the roomiest.

    There, ZeRO-3 and offloading rank last: the cost of their hooks and copies is the least certain.
    Returns: None where nothing fits.
    """
    return choose_among([option for option in options if option.fits and option.setup.nodes == nodes])


def choose_least_recomputing(fitting: Sequence[Option]) -> Option | None:
    """As `choose`, of the row of `all_options`, less those that do not fit."""
    same = groupby(fitting, key=lambda o: (o.profile, o.setup.micro_batch))
    return choose_among([next(levels) for _, levels in same])


def choose_among(fitting: Sequence[Option]) -> Option | None:
    """As `choose`, of options that all fit."""
    if not fitting:
        return None
    best = min(option.time.total for option in fitting)
    near = [option for option in fitting if option.time.total <= best * (1 + TIE)]
    return min(near, key=lambda o: (o.setup.stage == 3 or o.setup.offload_optimizer, o.memory.total))


def describe_choice(chosen: Option | None, job_as_it_is: Option, gpu: Gpu) -> str:
    """Reason for the choice: its needs, compared with the job as given."""
    limit_gb = job_as_it_is.memory_limit / GB
    room = f"{limit_gb:.0f} GB ({gpu.memory_gb:.0f} less {gpu.memory_gb - limit_gb:.0f} reserve)"
    if chosen is None:
        least = job_as_it_is.memory.total / GB
        return (
            f"nothing fits into {room} with this batch; the job as given needs about {least:.0f} GB. "
            "A shorter data.history, a smaller data.max_pixels, LoRA or more nodes need less"
        )
    need = f"about {chosen.memory.total / GB:.0f} of {room}"
    if keys_of(chosen.job) == keys_of(job_as_it_is.job):
        return f"the job as given: {need}; nothing that fits is more than {TIE:.0%} faster"
    if not job_as_it_is.fits:
        return f"{need}; the job as given needs about {job_as_it_is.memory.total / GB:.0f} GB and does not fit"
    gain = job_as_it_is.time.total / chosen.time.total
    if gain < 1 + TIE:
        saved = (job_as_it_is.memory.total - chosen.memory.total) / GB
        return f"{need}; as fast as the job as given, with {saved:.0f} GB less"
    return (
        f"{need}; {gain:.2f}× as fast as the job as given ({job_as_it_is.time.total:.1f} s a step), "
        "with the same effective batch"
    )


def describe_recompute(every: int) -> str:
    """Description of how much is recomputed."""
    return {0: "none", 1: "all", 2: "every 2nd", 3: "every 3rd"}.get(every, f"every {every}th")


def keys_of(job: JobConfig) -> dict[str, str]:
    """The keys that an option decides, as `--set` takes them."""
    training = job.training
    keys = {
        "deepspeed.profile": job.deepspeed.profile,
        "training.per_device_batch_size": str(training.per_device_batch_size),
        "training.gradient_accumulation_steps": str(training.gradient_accumulation_steps),
        "training.gradient_checkpointing": str(training.gradient_checkpointing).lower(),
    }
    if training.gradient_checkpointing:
        keys["training.gradient_checkpointing_every"] = str(training.gradient_checkpointing_every)
    return keys


def options_to_type(chosen: Option, job: JobConfig) -> list[str]:
    """What turns `job` into the chosen option on the command line; empty where nothing has to change."""
    before = keys_of(job)
    sets = [f"--set {key}={value}" for key, value in keys_of(chosen.job).items() if before.get(key) != value]
    nodes = [] if chosen.job.nodes == job.nodes else [f"--nodes {chosen.job.nodes}"]
    return nodes + sets


def other_samples(job: JobConfig) -> list[tuple[str, JobConfig]]:
    """The job with other histories and smaller frames: what one would type, and the job that it makes."""
    changes: list[tuple[str, dict[str, object]]] = []
    for history in (0, 4, 8, 16):
        if history != job.data.history:
            changes.append((f"data.history={history}", {"history": history}))
    sample = plan_sample(job.data)
    for share in (2, 4):
        pixels = sample.width * sample.height // share
        if pixels >= job.data.min_pixels:
            changes.append((f"data.max_pixels={pixels}", {"max_pixels": pixels}))
    return [(text, job.model_copy(update={"data": job.data.model_copy(update=update)})) for text, update in changes]


def plan_other_samples(
    job: JobConfig, *, sizes: Sizes, ranks_per_node: int, gpu: Gpu
) -> list[tuple[str, Option | None]]:
    """The best option for each other sample on the job's nodes; None where it is too long, or nothing fits."""
    found: list[tuple[str, Option | None]] = []
    for text, other in other_samples(job):
        try:
            options = plan_options(other, sizes=sizes, ranks_per_node=ranks_per_node, gpu=gpu, nodes=(job.nodes,))
        except UsageError:
            found.append((text, None))
            continue
        found.append((text, choose(options, nodes=job.nodes)))
    return found
