"""janus-cluster: parse, call, print; nothing else.

Commands are imported when they are called: `--help` answers before pydantic, rich or submitit could be loaded.
"""

from __future__ import annotations

import errno
import importlib
import os
from typing import TYPE_CHECKING, NoReturn

import click

from janus_cluster import __version__
from janus_cluster.errors import EXIT_CODES, PREFLIGHT_EXIT_CODES, JanusError, print_error
from janus_cluster.run.streams import run_program

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

# name → (module, object, one line of help). The order is that of a user's day.
COMMANDS: dict[str, tuple[str, str, str]] = {
    "init": (
        "janus_cluster.cli.init",
        "init",
        "Find out partition, account, GPUs and network of this site; write its defaults.",
    ),
    "submit": (
        "janus_cluster.cli.submit",
        "submit",
        "Check, render and submit a job; print what runs and what to type next.",
    ),
    "preflight": (
        "janus_cluster.cli.submit",
        "preflight",
        "Judge the nodes without training; exit 0 pass, 1 warn, 2 fail, 3 undetermined.",
    ),
    "tail": ("janus_cluster.cli.observe", "tail", "Follow the merged log of all nodes; end with the job's exit code."),
    "status": ("janus_cluster.cli.observe", "status", "Show state, attempt, step and what went wrong."),
    "eval": (
        "janus_cluster.cli.evaluate",
        "evaluate",
        "Judge a trained model on held-out episodes: actions, F1, perplexity, samples with pictures.",
    ),
    "simulate": (
        "janus_cluster.cli.simulate",
        "simulate",
        "Let a trained model walk: success rate and SPL in generated rooms, what it sees follows from what it does.",
    ),
    "export": (
        "janus_cluster.cli.export",
        "export",
        "Write a trained model in the layout in which JanusVLN was published, for its own evaluator.",
    ),
    "report": (
        "janus_cluster.cli.report",
        "report",
        "Write a page with pictures of a run, of two, or of an old training log.",
    ),
    "compare": ("janus_cluster.cli.report", "compare", "Print two runs beside each other: figures and configuration."),
    "list": ("janus_cluster.cli.observe", "list_runs", "List runs, the newest first."),
    "cancel": ("janus_cluster.cli.observe", "cancel", "End a job; ask first when much work would be lost."),
    "resume": ("janus_cluster.cli.submit", "resume", "Send an ended run once more, on from its newest checkpoint."),
    "nodes": ("janus_cluster.cli.nodes", "nodes", "List, add or forgive nodes that submissions keep away from."),
    "render": (
        "janus_cluster.cli.job",
        "render",
        "Print the script, environment or ZeRO JSON of a job; write nothing.",
    ),
    "data": (
        "janus_cluster.cli.data",
        "data",
        "Make a job's index of data before its GPUs are asked for.",
    ),
    "plan": (
        "janus_cluster.cli.plan",
        "plan",
        "Predict memory and time for every ZeRO stage, batch and number of nodes; name the way to take.",
    ),
    "config": (
        "janus_cluster.cli.job",
        "config",
        "Show a job's values and origins, or the JSON Schema of job files.",
    ),
    "demo-data": (
        "janus_cluster.janusvln.world.demo",
        "demo_data",
        "Write generated episodes to learn from: rooms, instructions, shortest ways.",
    ),
    "verify-core": (
        "janus_cluster.cli.verify",
        "verify_core",
        "Recompute reference numbers: does this installation compute JanusVLN?",
    ),
    "sandbox": (
        "janus_cluster.cli.sandbox",
        "sandbox",
        "A real Slurm on this machine, to rehearse on.",
    ),
}

_FULL = (errno.ENOSPC, errno.EDQUOT)
# What click's own completion scripts set; see docs/completion.md.
COMPLETION_VARIABLE = "_JANUS_CLUSTER_COMPLETE"

EPILOG = """\
\b
JOB is a job file or a shipped job for submit, preflight, render, plan and config;
a job id, run name or run folder elsewhere.
With --json stdout is one JSON document and nothing else; what went wrong is on stderr.

\b
Examples:
  janus-cluster submit --nodes 2 --follow
  janus-cluster status --watch
  janus-cluster COMMAND --help

\b
Exit codes:
{exit_codes}
  preflight alone: {preflight}

\b
See also: README.md, docs/two-nodes.md, docs/troubleshooting.md
""".format(
    exit_codes="\n".join(f"  {code:<4} {meaning}" for code, meaning in EXIT_CODES.items()),
    preflight=", ".join(f"{code} {meaning}" for code, meaning in PREFLIGHT_EXIT_CODES.items()),
)


class LazyGroup(click.Group):
    """A group whose commands are imported when they are needed."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, name, _ = COMMANDS[cmd_name]
        command: click.Command = getattr(importlib.import_module(module), name)
        if COMPLETION_VARIABLE in os.environ:
            from janus_cluster.cli.completion import add_completion

            add_completion(command)
        return command

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        from click.shell_completion import CompletionItem

        # click's own would import every command to ask whether it is hidden.
        names = [CompletionItem(n, help=text) for n, (_, _, text) in COMMANDS.items() if n.startswith(incomplete)]
        return [*names, *click.Command.shell_complete(self, ctx, incomplete)]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, _, text) in COMMANDS.items()])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            from janus_cluster.job.nearest import did_you_mean

            guess = did_you_mean(args[0], COMMANDS) or "."
            ctx.fail(f"No such command {args[0]!r}{guess} Commands: {', '.join(COMMANDS)}")
        return super().resolve_command(ctx, args)


@click.group(
    cls=LazyGroup,
    epilog=EPILOG,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, prog_name="janus-cluster")
def cli() -> None:
    """Train JanusVLN on 8×H800 nodes under Slurm: one line submits, gates, trains and follows."""


def main() -> NoReturn:
    """Run the command; the process ends with its exit code. Errors are printed for people."""
    run_program(_run)


def _run() -> int:
    """Run the command; an error is printed to stderr. Returns: the exit code."""
    try:
        code = cli.main(standalone_mode=False, prog_name="janus-cluster")
    except (click.exceptions.Abort, KeyboardInterrupt):
        # click lets the second one through while it completes a word.
        return 130
    except click.ClickException as e:
        e.show()
        return e.exit_code
    except JanusError as e:
        return print_error(e)
    except OSError as e:
        if e.errno == errno.ENOENT and e.filename is None:
            # os.getcwd raises it.
            click.echo("error: the folder that you are in was removed\nnext:  cd to another one", err=True)
            return 2
        if e.errno == errno.ENAMETOOLONG:
            path = str(e.filename)
            click.echo(f"error: {path[:40]}…: {len(path)} characters, longer than a path may be", err=True)
            return 2
        if e.errno not in _FULL:
            raise
        click.echo(f"error: {e.strerror}: {e.filename or 'a file was being written'}\nnext:  df -h", err=True)
        return 1
    return code if isinstance(code, int) else 0
