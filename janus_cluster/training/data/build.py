"""A job's index of data made before any GPU is asked for: python -m janus_cluster.training.data.build RUN_DIR

`janus-cluster data index` calls it at the desk, or on a node as a job of kind index. It reads as rank 0 of training
does, and refuses what training would refuse.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from janus_cluster.config.schema import JobConfig, ResolvedJob
from janus_cluster.errors import JanusError, print_error
from janus_cluster.rundir import RunDir
from janus_cluster.training.data.index import SampleSplit, load_samples
from janus_cluster.training.data.indexing import Told
from janus_cluster.training.data.lengths import load_token_counts


def build_index(job: JobConfig, *, index_dir: Path, told: Told, bad_data: Path | None = None) -> SampleSplit:
    """The index of every root lies in `index_dir`, with the token counts where model.path has a tokenizer.

    Returns: what would be trained on and held out.
    Raises: UsageError where training would be refused.
    """
    split = load_samples(
        job.data,
        seed=job.training.seed,
        pad_history=job.compat == "predecessor",
        index_dir=index_dir,
        bad_data=bad_data,
        told=told,
    )
    told.report(split.describe())
    if job.model.path is None:
        told.report("tokens: not counted, since model.path names no tokenizer")
        return split
    # It imports transformers, which takes longer than a small index.
    from janus_cluster.training.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(job.model.path)
    for samples, what in ((split.train, "samples"), (split.held_out, "held-out samples")):
        if len(samples):
            counts = load_token_counts(samples, tokenizer=tokenizer, data=job.data, what=what)
            span = f"{counts.min():,} to {counts.max():,}, {counts.mean():,.0f} on average"
            told.report(f"tokens of {len(samples):,} {what}: {span}")
    return split


def main() -> None:
    """The index of a run folder's job is made, or why not is said and the exit code is that of the error."""
    parser = argparse.ArgumentParser(prog="python -m janus_cluster.training.data.build", description=__doc__)
    parser.add_argument("run_dir", type=Path)
    run = RunDir(parser.parse_args().run_dir)
    try:
        job = ResolvedJob.load(run.resolved_json.read_text(encoding="utf-8")).job
        index_dir = Path(job.data.index_dir) if job.data.index_dir else run.data_index
        build_index(job, index_dir=index_dir, told=Told(report=_say), bad_data=run.bad_data_jsonl)
    except JanusError as error:
        sys.exit(print_error(error))


def _say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    main()
