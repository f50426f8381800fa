"""Files beside the package: templates and job files (a wheel has them too), reference numbers (a checkout only)."""

from __future__ import annotations

from pathlib import Path

from janus_cluster import __version__
from janus_cluster.errors import UsageError

_PACKAGE = Path(__file__).resolve().parent.parent
_CHECKOUT = _PACKAGE.parent


def _folder(name: str) -> Path:
    in_checkout = _CHECKOUT / name
    if (_CHECKOUT / "pyproject.toml").is_file() and in_checkout.is_dir():
        return in_checkout
    return _PACKAGE / "_data" / name


def templates_dir() -> Path:
    """The folder of sbatch templates, environment profiles, thresholds and ZeRO profiles."""
    return _folder("templates")


def jobs_dir() -> Path:
    """The folder of shipped job files."""
    return _folder("jobs")


def vectors_dir() -> Path:
    """The folder of verify-core's reference numbers. Raises: UsageError for a package installed from a wheel."""
    folder = _CHECKOUT / "tests" / "vectors"
    if not folder.is_dir():
        raise UsageError(
            "the reference numbers of verify-core (5 MB) are in the source of janus-cluster, not in a wheel",
            hint=f"janus-cluster verify-core SOURCE/tests/vectors (SOURCE: a checkout, or the sdist of {__version__})",
        )
    return folder
