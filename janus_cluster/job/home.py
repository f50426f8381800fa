"""Folders of runs, the sandbox and the site's records.

    JANUS_HOME=X   X/runs    X/sandbox                              X/site
    without it     ./runs    $XDG_STATE_HOME/janus-cluster/sandbox  $XDG_STATE_HOME/janus-cluster/site

XDG_STATE_HOME defaults to ~/.local/state. Indexes of data that no run keeps are in X/data_index or in
$XDG_CACHE_HOME/janus-cluster/data_index (~/.cache).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

# Below a run folder. #SBATCH --output names it, so it is known before there is a run folder.
BATCH_LOG = "logs/batch.log"


def runs_dir(environ: Mapping[str, str] | None = None, cwd: Path | None = None) -> Path:
    """The absolute folder that holds run folders; it need not exist yet."""
    env = os.environ if environ is None else environ
    here = Path.cwd() if cwd is None else cwd
    home = env.get("JANUS_HOME")
    return _absolute(Path(home), here) / "runs" if home else _absolute(here, Path.cwd()) / "runs"


def sandbox_home(environ: Mapping[str, str] | None = None) -> Path:
    """The absolute folder of the sandbox Slurm; it need not exist yet."""
    return _state_dir(os.environ if environ is None else environ) / "sandbox"


def site_dir(environ: Mapping[str, str] | None = None) -> Path:
    """The absolute folder of what is remembered about the site; it need not exist yet."""
    return _state_dir(os.environ if environ is None else environ) / "site"


def index_cache(environ: Mapping[str, str] | None = None) -> Path:
    """The absolute folder for indexes of data that no run keeps; it need not exist yet and may be deleted."""
    env = os.environ if environ is None else environ
    home = env.get("JANUS_HOME")
    if home:
        return _absolute(Path(home), Path.cwd()) / "data_index"
    return _xdg_dir(env, "XDG_CACHE_HOME", ".cache") / "data_index"


def _state_dir(env: Mapping[str, str]) -> Path:
    home = env.get("JANUS_HOME")
    if home:
        return _absolute(Path(home), Path.cwd())
    return _xdg_dir(env, "XDG_STATE_HOME", ".local/state")


def _xdg_dir(env: Mapping[str, str], variable: str, default: str) -> Path:
    """Our folder under the one that the variable names, by default under the user's home."""
    # XDG base directory specification: a relative value is ignored.
    xdg = Path(env.get(variable) or "")
    if xdg.is_absolute():
        return xdg / "janus-cluster"
    user_home = Path(env["HOME"]) if env.get("HOME") else Path.home()
    return _absolute(user_home, Path.cwd()) / default / "janus-cluster"


def _absolute(path: Path, base: Path) -> Path:
    return Path(os.path.normpath(base / Path(os.path.expanduser(path))))
