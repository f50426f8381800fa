"""Shell completion: runs for the commands that look at one, job files for those that read one.

click handles the shells' protocols; this module gives the completions, from names of files and from submission.json of
the newest runs only. Slurm is not asked: TAB has to answer at once.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import click
from click.shell_completion import CompletionItem
from click.types import StringParamType

_NEWEST_RUNS = 50
_JOB_FILE_COMMANDS = frozenset({"submit", "preflight", "render", "plan", "show", "check"})
_RUN_ARGUMENTS = frozenset({"job", "jobs", "run", "runs", "model_or_run"})
# A completion is inserted unquoted: a name with a space, a quote or a `;` in it would not stay one argument.
_PLAIN_WORD = re.compile(r"[\w./+@%=:,-]+")


def add_completion(command: click.Command) -> click.Command:
    """JOB and RUN of the command, and of its subcommands, are completed. Returns: the same command."""
    if isinstance(command, click.Group):
        for child in command.commands.values():
            add_completion(child)
    for param in command.params:
        if isinstance(param, click.Argument) and param.name in _RUN_ARGUMENTS and param.type is click.STRING:
            param.type = JobFileArgument() if command.name in _JOB_FILE_COMMANDS else RunArgument()
    return command


class RunArgument(StringParamType):
    """A job id, a run name, a job name or a run folder."""

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        if "/" in incomplete or incomplete.startswith("~"):
            return [CompletionItem(incomplete, type="dir")]
        texts: dict[str, str] = {}
        for folder in cast("list[Path]", ctx.params.get("runs_dirs", [])):
            for path in _newest_folders(folder):
                for word, help_text in _names_of(path):
                    texts.setdefault(word, help_text)
        return [CompletionItem(w, help=text) for w, text in texts.items() if _fits(w, incomplete)]


class JobFileArgument(StringParamType):
    """A shipped job, or a YAML file."""

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        from janus_cluster.job.resources import jobs_dir

        shipped = [path.stem for path in _yaml_files(jobs_dir())]
        typed = incomplete[: incomplete.rfind("/") + 1]
        prefixes = [typed] if typed else ["", "jobs/"]
        own = [prefix + path.name for prefix in prefixes for path in _yaml_files(Path(prefix))]
        found = [CompletionItem(word) for word in [*shipped, *own] if _fits(word, incomplete)]
        # No match among ours: the shell completes the path, folder by folder.
        return found or [CompletionItem(incomplete, type="file")]


def _newest_folders(folder: Path) -> list[Path]:
    try:
        with os.scandir(folder) as entries:
            found = [(e.stat().st_mtime, e.path) for e in entries if not e.name.startswith(".") and e.is_dir()]
    except OSError:
        return []
    return [Path(path) for _, path in sorted(found, reverse=True)[:_NEWEST_RUNS]]


def _names_of(path: Path) -> Iterator[tuple[str, str]]:
    """The run's job id, its folder's name and its job's name, each with what a shell may show beside it."""
    from janus_cluster.run.current import has_bundles
    from janus_cluster.run.paths import RunDir
    from janus_cluster.run.records.submission import load_submission

    run = RunDir(path)
    sent = load_submission(run)
    if sent is None and not has_bundles(run):
        return
    if sent is not None and sent.job_id:
        yield sent.job_id, run.name
    yield run.name, f"job {sent.job_id}" if sent is not None and sent.job_id else "not submitted"
    # <name>-<time>-<id>, as run folders are named.
    yield run.name.rsplit("-", 2)[0], "the newest of this name"


def _yaml_files(folder: Path) -> list[Path]:
    try:
        return sorted(p for p in folder.iterdir() if p.suffix in (".yaml", ".yml"))
    except OSError:
        return []


def _fits(word: str, incomplete: str) -> bool:
    return word.startswith(incomplete) and _PLAIN_WORD.fullmatch(word) is not None
