"""`python -m janus_cluster.training` is one training process, under torchrun; entry.py has what it does.

A program of this name, because multiprocessing does not import a `__main__` again in the processes that it spawns:
those that read data (janusvln/data/pool.py) would need seconds for torch.
"""

from janus_cluster.training.entry import main
from janus_cluster.training.world import run_and_leave

run_and_leave(main)
