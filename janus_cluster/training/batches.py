"""A job's training samples as this rank's micro-batches: roots, weights and token counts in, RankBatches out."""

from __future__ import annotations

from typing import Any

from janus_cluster.janusvln.data.index import SampleSplit
from janus_cluster.janusvln.data.lengths import load_token_counts
from janus_cluster.janusvln.data.sampler import RankBatches, SampleOrder
from janus_cluster.janusvln.data.table import SampleTable
from janus_cluster.job.schema import JobConfig
from janus_cluster.run.next_command import command_for
from janus_cluster.run.paths import RunDir
from janus_cluster.run.records.training import DataRecord, SamplesRecord
from janus_cluster.training.world import World, share_among


def build_batches(job: JobConfig, samples: SampleTable, tokenizer: Any, world: World) -> RankBatches:
    """This rank's part of every optimizer step, in the order of training.seed and the weights of data.roots.

    Every rank calls this: rank 0 counts the tokens for all.
    Raises: UsageError if samples are too long and data.on_too_long does not help.
    """
    training = job.training
    per_rank = training.per_device_batch_size * training.gradient_accumulation_steps
    order = SampleOrder(
        root_of_sample=samples.root_index,
        root_weights=[root.weight for root in job.data.roots],
        seed=training.seed,
        effective_batch_size=per_rank * world.world_size,
    )
    counts = load_token_counts(samples, tokenizer=tokenizer, data=job.data, share=share_among(world))
    return RankBatches(
        order,
        rank=world.rank,
        world_size=world.world_size,
        rows=training.per_device_batch_size,
        token_counts=counts if job.data.group_by_length else None,
    )


def note_samples(run: RunDir, split: SampleSplit, *, resumes: bool, accepts_change: bool = False) -> str | None:
    """Write data.json: the samples that the run draws from and the walks that it holds out.

    The order depends on the number of samples, so it changes with them. One rank calls this.
    Returns: a warning in every attempt that continues with other samples, until the change is accepted.
    """
    now = SamplesRecord(num_samples=len(split.train), fingerprint=split.train.fingerprint())
    last = DataRecord.load(run.data_json)
    before = now
    if last is not None and resumes and not accepts_change:
        before = last.accepted or SamplesRecord(num_samples=last.num_samples, fingerprint=last.fingerprint)
    has_changed = before.fingerprint != now.fingerprint
    DataRecord(
        num_samples=now.num_samples,
        fingerprint=now.fingerprint,
        accepted=before if has_changed else None,
        split=split.split.to_record(),
    ).write(run.data_json)
    if not has_changed:
        return None
    accept = command_for("resume", run, "--set restart.accept_changed_data=true")
    return (
        f"the training data changed since the run began ({before.num_samples:,} samples then, {now.num_samples:,} "
        "now): the steps draw in another order, so some samples of this epoch come again and others not; "
        f"where that is as it should be: {accept}"
    )
