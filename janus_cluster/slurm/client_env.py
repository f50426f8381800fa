"""The variables with which Slurm's programs reach one Slurm of several: its slurm.conf, and a PATH of its own programs.

A Slurm whose programs are not the system's has client_env.json beside its slurm.conf; the sandbox writes one.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from janus_cluster.run.files import read_json, write_json_atomically

_FILE = "client_env.json"


def client_env(slurm_conf: Path) -> dict[str, str]:
    """SLURM_CONF, and the variables of client_env.json."""
    try:
        value = read_json(slurm_conf.parent / _FILE)
    except (OSError, ValueError):
        value = None
    extra = {str(k): str(v) for k, v in value.items()} if isinstance(value, dict) else {}
    return {**extra, "SLURM_CONF": str(slurm_conf)}


def write_client_env(slurm_conf: Path, env: Mapping[str, str]) -> None:
    """Write `env`: every client of this slurm.conf is started with it from now on."""
    write_json_atomically(slurm_conf.parent / _FILE, dict(env))
