"""Where the shipped templates and job files lie: at the top of a checkout, inside the package of an installed wheel."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
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
