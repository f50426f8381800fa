"""A job's training samples as this rank's micro-batches: roots, weights and token counts in, RankBatches out."""

from __future__ import annotations

from typing import Any

from janus_cluster.config.schema import JobConfig
from janus_cluster.rundir import RunDir, read_json, write_json_atomically
from janus_cluster.training.data.index import SampleSplit
from janus_cluster.training.data.lengths import load_token_counts
from janus_cluster.training.data.sampler import RankBatches, SampleOrder
from janus_cluster.training.data.table import SampleTable
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


def note_samples(run: RunDir, split: SampleSplit, *, resumes: bool) -> str | None:
    """data.json says which samples the run draws from, and which walks it holds out.

    The order follows from how many samples there are, so it changes with them. One rank calls this.
    Returns: a warning where the run goes on with other samples.
    """
    samples = split.train
    now = {
        "schema_version": 1,
        "num_samples": len(samples),
        "fingerprint": samples.fingerprint(),
        "split": split.split.to_json(),
    }
    before = read_json(run.data_json) if run.data_json.exists() else now
    write_json_atomically(run.data_json, now)
    if not resumes or before["fingerprint"] == now["fingerprint"]:
        return None
    return (
        f"the training data changed since the last attempt ({before['num_samples']:,} samples then, {len(samples):,} "
        "now): from here on the steps draw in another order, so some samples of this epoch come again and others not"
    )
