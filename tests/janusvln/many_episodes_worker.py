"""Loads and counts a data set as rank 0 does, in a process of its own: what it took is one line of JSON.

python many_episodes_worker.py ROOT INDEX_DIR
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from janus_cluster.janusvln.data.index import load_samples
from janus_cluster.janusvln.data.indexing import Reporter
from janus_cluster.janusvln.data.lengths import load_token_counts
from janus_cluster.janusvln.data.prompt import sample_texts
from janus_cluster.janusvln.data.tokenizer import build_tiny_tokenizer
from janus_cluster.job.schema import Data


def peak_mb() -> float:
    """The most memory that this program has had; getrusage's figure includes the program that started it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1e3


def main() -> None:
    root, index_dir = Path(sys.argv[1]), Path(sys.argv[2])
    at_start_mb = peak_mb()
    data = Data(roots=[str(root)])
    output: list[str] = []
    begun = time.perf_counter()
    split = load_samples(data, seed=0, index_dir=index_dir, reporter=Reporter(report=output.append))
    loaded = time.perf_counter()
    tokenizer = build_tiny_tokenizer(sample_texts(split.train[:100]))
    ready = time.perf_counter()
    counts = load_token_counts(split.train, tokenizer=tokenizer, data=data)
    found = {
        "lines": output,
        "load_s": loaded - begun,
        "count_s": time.perf_counter() - ready,
        "samples": len(split.train) + len(split.held_out),
        "episodes": len({sample.episode for sample in split.train[::97]}),
        "counts": [int(counts.min()), int(counts.max()), len(counts)],
        "lost": sorted(Path(problem.path).relative_to(root).as_posix() for problem in split.problems),
        "grown_mb": peak_mb() - at_start_mb,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
