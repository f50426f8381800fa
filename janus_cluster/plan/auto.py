"""`training.memory: auto`: choose the keys of a way to train that fits, and what is tried next. No torch.

Nodes, sample and effective batch are kept. So are keys of --set, and those from a variable of the shell; values of the
job file are only a starting point.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from janus_cluster.errors import UsageError
from janus_cluster.job.load import LoadedJob, value_of, with_values
from janus_cluster.job.nearest import did_you_mean
from janus_cluster.job.resolve import processes_per_node
from janus_cluster.job.resolved import MemoryOption, MemoryPlan
from janus_cluster.job.schema import MOST_NODES, JobConfig, Model
from janus_cluster.modelspec.sizes import Sizes, load_sizes, preset_sizes
from janus_cluster.plan.choose import (
    ACCUMULATION,
    DECIDED,
    MICRO_BATCH,
    Option,
    all_options,
    batches_to_type,
    choose_least_recomputing,
    describe_recompute,
    nodes_to_plan,
    other_samples,
    wanted_batch,
)
from janus_cluster.plan.hardware import Gpu, known_gpu, known_gpus
from janus_cluster.plan.memory import GB

ORIGIN = "training.memory: auto"
# The one chosen, and what is tried where it runs out of memory in its first step.
_MOST_OPTIONS = 4
# The next one needs at most this share: less of a step would meet the same end.
_LESS = 0.9
_MANUAL = "--set training.memory=manual"
# Under deepspeed.overrides these may only repeat the job's values.
_IN_DEEPSPEED = {"train_micro_batch_size_per_gpu": MICRO_BATCH, "gradient_accumulation_steps": ACCUMULATION}


@dataclass(frozen=True, kw_only=True)
class _Search:
    """What every option of one job has in common."""

    job: JobConfig
    sizes: Sizes
    gpu: Gpu
    batch: int
    pinned: frozenset[str]

    @property
    def ranks_per_node(self) -> int:
        return processes_per_node(self.job)

    def options(self) -> list[Option]:
        """Raises: UsageError where no micro-batch divides the batch."""
        found = all_options(
            self.job,
            sizes=self.sizes,
            ranks_per_node=self.ranks_per_node,
            gpu=self.gpu,
            batch=self.batch,
            pinned=self.pinned,
        )
        if self.job.hardware.device == "cpu":
            # Offloaded, it would be in the same memory.
            found = [option for option in found if not option.setup.offload_optimizer]
        if not found:
            ranks = self.job.nodes * self.ranks_per_node
            own = "".join(f", {key}: {value_of(self.job, key)}" for key in sorted(self.pinned))
            divided = self.batch % ranks == 0
            raise UsageError(
                f"training.memory: auto: nothing gives the effective batch of {self.batch} on {ranks} ranks{own}",
                hint="leave out what was given" if divided else batches_to_type(self.batch, ranks=ranks),
            )
        return found


def plan_memory_keys(
    loaded: LoadedJob,
    *,
    batch: int | None = None,
    below_gb: float | None = None,
    gpu: Gpu | None = None,
) -> tuple[LoadedJob, MemoryPlan | None]:
    """The job with the keys that `training.memory: auto` chose, and the plan; unchanged where manual.

    `batch` is the effective batch to keep, where it is not the job's; what was planned with `below_gb` has run out of
    memory, so clearly less is chosen.
    Raises: UsageError for hardware that is not known, and where nothing fits.
    """
    job = loaded.config
    if job.training.memory == "manual" or job.kind != "train":
        return loaded, None
    gpu = gpu or known_gpu(job.hardware)
    if gpu is None:
        raise _unknown_gpu(loaded)
    batch = batch or wanted_batch(job, ranks_per_node=processes_per_node(job))
    search = _Search(job=as_trained(job), sizes=_sizes(job.model), gpu=gpu, batch=batch, pinned=pinned_keys(loaded))
    options = search.options()
    usable = [o for o in options if o.fits and (below_gb is None or o.memory.total <= _LESS * below_gb * GB)]
    chosen = choose_least_recomputing(usable)
    if chosen is None:
        raise _nothing_fits(search, options, below_gb)
    decided = {key: value_of(chosen.job, key) for key in DECIDED}
    origins = dict(loaded.origins) | {key: ORIGIN for key in DECIDED if key not in search.pinned}
    row = [chosen, *_smaller(chosen, usable)]
    plan = MemoryPlan(
        gpu=gpu.name,
        gpu_memory_gb=gpu.memory_gb,
        limit_gb=round(chosen.memory_limit / GB, 3),
        options=tuple(map(_as_option, row)),
        reasons=(*_reasons(row, usable, loaded), *_ran_out(below_gb)),
        out_of_memory_gb=below_gb,
    )
    return replace(loaded, config=with_values(job, decided), origins=dict(sorted(origins.items()))), plan


def pinned_keys(loaded: LoadedJob) -> frozenset[str]:
    """Keys that were set explicitly: on the command line, by a variable of the shell, or in deepspeed.overrides."""
    given = {key for key in DECIDED if loaded.origins.get(key, "").startswith(("--set", "resume --set", "$"))}
    return frozenset(given | {_IN_DEEPSPEED[key] for key in loaded.config.deepspeed.overrides if key in _IN_DEEPSPEED})


def _sizes(model: Model) -> Sizes:
    """As load_sizes; for weights that only the nodes can see, the preset's sizes."""
    is_here = model.path is not None and (Path(os.path.expanduser(model.path)) / "config.json").is_file()
    return load_sizes(model) if is_here else preset_sizes(model.preset)


def as_trained(job: JobConfig) -> JobConfig:
    """The job with the settings of `compat` applied."""
    return job if job.compat == "none" else with_values(job, {"data.image_mode": "pad"})


def _smaller(chosen: Option, usable: Sequence[Option]) -> list[Option]:
    """What follows the chosen option, each needing clearly less than the one before; the last one the least of all."""
    row = [chosen]
    while len(row) < _MOST_OPTIONS:
        less = [o for o in usable if o.memory.total <= _LESS * row[-1].memory.total]
        if not less:
            break
        is_last = len(row) == _MOST_OPTIONS - 1
        # Offloading last: how much memory the host has is not known.
        least = min(less, key=lambda o: (o.setup.offload_optimizer, o.memory.total))
        row.append(least if is_last else choose_least_recomputing(less) or least)
    return row[1:]


def _as_option(option: Option) -> MemoryOption:
    return MemoryOption(
        keys={key: value_of(option.job, key) for key in DECIDED},
        planned_gb=round(option.memory.total / GB, 3),
        step_s=round(option.time.total, 3),
        words=describe_way(option),
    )


def describe_way(option: Option) -> str:
    """The option as text: zero2, batch 2×8, recompute every 2nd layer."""
    setup, again = option.setup, describe_recompute(option.setup.work.recompute_every)
    layers = {"none": "", "all": " layers"}.get(again, " layer")
    return f"{option.profile}, batch {setup.micro_batch}×{setup.accumulation}, recompute {again}{layers}"


def _reasons(row: Sequence[Option], usable: Sequence[Option], loaded: LoadedJob) -> list[str]:
    """Lines for people: why this one, what follows it, and what of the job file it replaces."""
    chosen = row[0]
    others = sorted((o for o in usable if o is not chosen), key=lambda o: o.time.total)
    lines = []
    if not others:
        lines.append("nothing else fits")
    elif (faster := others[0]).time.total < chosen.time.total:
        lines.append(f"about as fast as the fastest, with more room: {_needs(faster)}")
    else:
        lines.append(f"the fastest that fits; next best: {_needs(faster)}")
    if row[1:]:
        lines.append("if its first step runs out of memory: " + ", then ".join(_needs(o) for o in row[1:]))
    before = loaded.config
    replaced = [
        f"{key}: {str(value_of(before, key)).lower()} → {str(value_of(chosen.job, key)).lower()}"
        for key in DECIDED
        if value_of(before, key) != value_of(chosen.job, key) and loaded.origins.get(key, "default") != "default"
    ]
    return [*lines, *([f"instead of the values in {loaded.source}: " + ", ".join(replaced)] if replaced else [])]


def _ran_out(below_gb: float | None) -> list[str]:
    return [] if below_gb is None else [f"clearly less than {show_gb(below_gb)}: what was planned with that ran out"]


def _needs(option: Option) -> str:
    return f"{describe_way(option)} ({show_gb(option.memory.total / GB)})"


def show_gb(gb: float) -> str:
    """Whole GB, but where that would hide the difference."""
    return f"{gb:.0f} GB" if gb >= 10 else f"{gb:.3g} GB"


def describe_memory(plan: MemoryPlan) -> list[str]:
    """The choice and its reasons, a line each; the first is the plan."""
    option = plan.option
    head = f"{option.words}: {show_gb(option.planned_gb)} of {show_gb(plan.limit_gb)} planned per {plan.gpu}"
    if plan.gpu in {gpu.name for gpu in known_gpus().values()}:
        head += f", {option.step_s:.1f} s a step predicted"
    return [head, *plan.reasons]


def _unknown_gpu(loaded: LoadedJob) -> UsageError:
    hardware, where = loaded.config.hardware, loaded.origins.get("training.memory", loaded.source)
    if hardware.device == "cpu":
        problem = "hardware.device is cpu, and how much memory a rank has is not known"
    else:
        known = known_gpus()
        guess = did_you_mean(hardware.gpu_type, known)
        problem = f"hardware.gpu_type {hardware.gpu_type!r} is not known{guess}; known: {', '.join(known)}, or a path"
    return UsageError(
        f"{where}: training.memory: auto: {problem}",
        hint=f"--set hardware.gpu_memory_gb=… (of one {'rank' if hardware.device == 'cpu' else 'GPU'}), or {_MANUAL}",
    )


def _nothing_fits(search: _Search, options: Sequence[Option], below_gb: float | None) -> UsageError:
    """What comes nearest, and what would fit."""
    nearest = min(options, key=lambda o: o.memory.total)
    limit = show_gb(nearest.memory_limit / GB)
    ran_out = f"; what was planned with {show_gb(below_gb)} ran out of memory" if below_gb is not None else ""
    ways = list(_ways_out(search))
    return UsageError(
        f"training.memory: auto: nothing fits into {limit} ({search.gpu.name}) with an effective batch of "
        f"{search.batch} on {search.job.nodes} node{'s' * (search.job.nodes > 1)}{ran_out}; nearest: {_needs(nearest)}",
        hint=f"{'; or '.join([*ways, _MANUAL])} to try all the same" if ways else f"a smaller network, or {_MANUAL}",
    )


def _ways_out(search: _Search) -> list[str]:
    """What to type so that something fits, that which changes least first."""
    job, found = search.job, []
    if search.pinned and _fits(replace(search, pinned=frozenset())):
        found.append(f"leave out {', '.join(f'--set {key}' for key in sorted(search.pinned))}")
    more = (n for n in nodes_to_plan(MOST_NODES) if n > job.nodes)
    enough = next((n for n in more if _fits(replace(search, job=job.model_copy(update={"nodes": n})))), None)
    if enough is not None:
        found.append(f"--nodes {enough}")
    samples = [(text, other) for text, other in other_samples(job) if _fits(replace(search, job=other))]
    # The longest history that fits, and the largest frame.
    for prefix in ("data.history", "data.max_pixels"):
        fitting = [text for text, _ in samples if text.startswith(prefix)]
        if fitting:
            found.append(f"--set {max(fitting, key=lambda text: int(text.rpartition('=')[2]))}")
    adapters = with_values(job, {"training.lora.enabled": True})
    if not found and not job.training.lora.enabled and _fits(replace(search, job=adapters)):
        found.append("--set training.lora.enabled=true")
    return found


def _fits(search: _Search) -> bool:
    try:
        return any(option.fits for option in search.options())
    except UsageError:
        # Too long a sample, or a batch that this number of ranks does not divide.
        return False
