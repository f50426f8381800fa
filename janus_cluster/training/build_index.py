"""A job's index of data, before any GPU is asked for: python -m janus_cluster.training.build_index RUN_DIR --bundle N

`janus-cluster data index` calls it at the desk, or on a node as a job of kind index. It reads as rank 0 of training
does, and refuses what training would refuse.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from janus_cluster.errors import JanusError, print_error
from janus_cluster.janusvln.data.index import SampleSplit, load_samples
from janus_cluster.janusvln.data.indexing import Reporter
from janus_cluster.janusvln.data.lengths import load_token_counts
from janus_cluster.job.schema import JobConfig
from janus_cluster.run.paths import RunDir
from janus_cluster.run.records.bundle import load_resolved


def build_index(job: JobConfig, *, index_dir: Path, reporter: Reporter, bad_data: Path | None = None) -> SampleSplit:
    """Write the index of every root to `index_dir`, with the token counts where model.path has a tokenizer.

    Returns: the samples to train on and held out.
    Raises: UsageError where training would be refused.
    """
    split = load_samples(
        job.data,
        seed=job.training.seed,
        pad_history=job.compat == "predecessor",
        index_dir=index_dir,
        bad_data=bad_data,
        reporter=reporter,
    )
    reporter.report(split.describe())
    if job.model.path is None:
        reporter.report("tokens: not counted, since model.path names no tokenizer")
        return split
    # It imports transformers, which takes longer than a small index.
    from janus_cluster.janusvln.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(job.model.path)
    for samples, what in ((split.train, "samples"), (split.held_out, "held-out samples")):
        if len(samples):
            counts = load_token_counts(samples, tokenizer=tokenizer, data=job.data, what=what)
            span = f"{counts.min():,} to {counts.max():,}, {counts.mean():,.0f} on average"
            reporter.report(f"tokens of {len(samples):,} {what}: {span}")
    return split


def main() -> None:
    """Build the index of a run folder's job; an error is printed and gives the exit code."""
    parser = argparse.ArgumentParser(prog="python -m janus_cluster.training.build_index", description=__doc__)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--bundle", type=int, required=True)
    arguments = parser.parse_args()
    run = RunDir(arguments.run_dir)
    try:
        job = load_resolved(run.bundle(arguments.bundle)).job
        index_dir = Path(job.data.index_dir) if job.data.index_dir else run.data_index
        build_index(job, index_dir=index_dir, reporter=Reporter(report=_print), bad_data=run.bad_data_jsonl)
    except JanusError as error:
        sys.exit(print_error(error))


def _print(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    main()
