"""janus-cluster: from one job file to a trained JanusVLN model on one or more 8×H800 nodes under Slurm."""

__version__ = "0.2.0.dev0"
