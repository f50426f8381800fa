"""Options that several commands have."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import click
from click.shell_completion import CompletionItem
from click.types import StringParamType

from janus_cluster.job.home import runs_dir, site_dir


def _or_the_default(_ctx: click.Context, _param: click.Parameter, given: tuple[Path, ...]) -> list[Path]:
    return list(given) or [runs_dir(os.environ, Path.cwd())]


# The command gets the folders, the default one where none was given.
runs_dir_option = click.option(
    "--runs-dir",
    "runs_dirs",
    multiple=True,
    type=click.Path(file_okay=False, path_type=Path),
    callback=_or_the_default,
    help="Folder of run folders; may be repeated. Default: $JANUS_HOME/runs, else ./runs.",
)


def nodes_option(text: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """--nodes N; the job's schema knows which numbers are allowed. `text`: its value without the option."""
    return click.option("--nodes", type=int, metavar="N", help=text)


json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")


class ProfileName(StringParamType):
    """A name of templates/<folder> or of the site's own, or a path."""

    def __init__(self, folder: Literal["preflight", "gpu"]) -> None:
        self._folder = folder

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        from janus_cluster.job.profiles import profile_names

        names = [name for name in profile_names(self._folder, site_dir(os.environ)) if name.startswith(incomplete)]
        return [CompletionItem(name) for name in names] or [CompletionItem(incomplete, type="file")]
