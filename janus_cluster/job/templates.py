"""Load ZeRO profiles, templates and name lists from the disk. Profiles of sites: profiles.py."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from janus_cluster.errors import UsageError
from janus_cluster.job.resources import templates_dir

if TYPE_CHECKING:
    import jinja2


def template_environment(templates: Path | Mapping[str, str], *, is_html: bool = False) -> jinja2.Environment:
    """What renders the templates of a folder, or these texts by name. A value that is not given is an error.

    is_html: every value is escaped, so that it may hold anything.
    """
    import jinja2  # 60 ms that most commands need not pay

    folder_or_texts = jinja2.FileSystemLoader if isinstance(templates, Path) else jinja2.DictLoader
    return jinja2.Environment(
        loader=folder_or_texts(templates),  # type: ignore[arg-type]
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=is_html,
        # ${#name} is bash for a length.
        comment_start_string="{##",
        comment_end_string="##}",
    )


def load_ds_profile(name: str) -> dict[str, Any]:
    """The object of templates/deepspeed/<name>.json. Raises: UsageError naming the profiles that exist."""
    path = templates_dir() / "deepspeed" / f"{name}.json"
    if not path.is_file():
        known = sorted(p.stem for p in path.parent.glob("*.json"))
        raise UsageError(f"deepspeed.profile: there is no profile {name!r}", hint=f"one of: {', '.join(known)}")
    data = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(data, dict):
        raise UsageError(f"{path}: not a JSON object")
    return data


@functools.cache
def load_gpu_errors() -> dict[str, Any]:
    """templates/gpu_errors.yaml: what each Xid, each immediate action and each recovery action means."""
    import yaml

    data: dict[str, Any] = yaml.safe_load((templates_dir() / "gpu_errors.yaml").read_text(encoding="utf-8"))
    return data


def load_nccl_variable_names() -> frozenset[str]:
    """Every name that some NCCL release reads."""
    lines = (templates_dir() / "env" / "nccl_variables.txt").read_text(encoding="utf-8").splitlines()
    return frozenset(line for line in lines if line and not line.startswith("#"))


def template_paths() -> list[Path]:
    """Every shipped file that run folders are rendered from; manifest.json holds their sha256."""
    root = templates_dir()
    return sorted(
        p for room in ("deepspeed", "env", "gpu", "preflight", "sbatch") for p in (root / room).iterdir() if p.is_file()
    )
