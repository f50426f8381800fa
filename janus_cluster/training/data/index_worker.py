"""One process that reads units of data sets: python -m janus_cluster.training.data.index_worker

Pickled tasks come in on stdin, pickled results go out on stdout. It is a process of its own rather than a fork, because
the trainer's process holds torch, threads and a device; this one holds neither and starts in a fraction of a second.
"""

from __future__ import annotations

import os
import pickle
import sys

from janus_cluster.training.data.index_tasks import run_task


def main() -> None:
    """Tasks are worked off until stdin ends."""
    # Whatever a library prints must not get among the results.
    results = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    while True:
        try:
            task = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        pickle.dump(run_task(task), results, protocol=pickle.HIGHEST_PROTOCOL)
        results.flush()


if __name__ == "__main__":
    main()
