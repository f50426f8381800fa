"""report and compare as click commands: parse, call, print."""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from janus_cluster.cli.options import json_option, runs_dir_option
from janus_cluster.errors import JanusError, UsageError
from janus_cluster.observe.find import find_run
from janus_cluster.run.text import to_json

if TYPE_CHECKING:
    from janus_cluster.report.history import History


@click.command(
    "report",
    epilog="""\b
Examples:
  janus-cluster report demo
  janus-cluster report demo-20261121T111709Z-10be demo-20261121T111959Z-b25f --out /tmp/both
  janus-cluster report --from-log train.log demo     a run beside a log of the old scripts
  janus-cluster report demo --json                   where the page, pictures and events are

\b
Exit codes: 0 written, 1 matplotlib or (--tensorboard) tensorboard is missing,
2 nothing to report, 22 no such run.

\b
See also: docs/report.md
""",
)
@click.argument("runs", nargs=-1, metavar="[RUN] [RUN2]")
@click.option(
    "--from-log",
    "log",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A log of the predecessor's training instead of a run, alone or beside RUN.",
)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    help="Write here; default: <run>/report, of two <run>/report/with_<other>, of a log alone <log>.report.",
)
@click.option(
    "--tensorboard/--no-tensorboard",
    default=None,
    help="TensorBoard event files of each, from the metrics. Default: where the package tensorboard is installed.",
)
@json_option
@runs_dir_option
def report(
    *,
    runs: tuple[str, ...],
    log: Path | None,
    out: Path | None,
    tensorboard: bool | None,
    as_json: bool,
    runs_dirs: list[Path],
) -> None:
    """Write one HTML page and its pictures: loss, accuracy, speed, ranks, attempts, configuration.

    With two runs: both curves in one picture, and what differs in their configurations. The page holds its pictures
    and asks no other place for anything. The run may still be training.
    """
    from janus_cluster.report.drawing import require_matplotlib
    from janus_cluster.report.history import load_history
    from janus_cluster.report.old_log import load_old_log
    from janus_cluster.report.write import default_folder, events_folder, write_report

    if not 1 <= len(runs) + (log is not None) <= 2:
        raise UsageError(
            f"report takes one or two: runs, or a run and --from-log; {len(runs) + (log is not None)} given",
            hint="janus-cluster report RUN [RUN2]; janus-cluster list shows the runs",
        )
    # Before what takes a second to import.
    found = [find_run(run, runs_dirs) for run in runs]
    require_matplotlib()
    with_events, hint = _decide_tensorboard(tensorboard)
    histories = [load_history(run) for run in found] + ([load_old_log(log)] if log else [])
    _require_something(histories)
    folder = out or default_folder(found, log)
    try:
        written = write_report(histories, folder, made_at=time.time(), tensorboard=with_events)
    except OSError as e:
        raise JanusError(f"{e.filename or folder}: {e.strerror}", hint="--out DIR writes elsewhere") from e
    events = events_folder(folder) if with_events else None
    if as_json:
        pictures = sorted(str(p) for p in folder.glob("*.png"))
        click.echo(to_json({"page": str(written), "pictures": pictures, "tensorboard": events and str(events)}))
        return
    click.echo(f"report: {written}")
    if events is not None:
        click.echo(f"tensorboard: tensorboard --logdir {shlex.quote(str(events))}")
    if hint is not None:
        click.echo(hint)


def _decide_tensorboard(wanted: bool | None) -> tuple[bool, str | None]:
    """(whether event files are written, a note where that is the default but impossible).

    Raises: JanusError where they were requested and cannot be written.
    """
    from janus_cluster.report.tensorboard import require_tensorboard

    if wanted is False:
        return False, None
    try:
        require_tensorboard()
    except JanusError as e:
        if wanted:
            raise
        return False, f"tensorboard: no event files were written; to get them: {e.hint}"
    return True, None


@click.command(
    "compare",
    epilog="""\b
Examples:
  janus-cluster compare 4711 4712
  janus-cluster compare demo-20261121T111709Z-10be demo-20261121T111959Z-b25f --json

\b
See also: docs/report.md
""",
)
@click.argument("runs", nargs=2, metavar="A B")
@json_option
@runs_dir_option
def compare(*, runs: tuple[str, str], as_json: bool, runs_dirs: list[Path]) -> None:
    """Print two runs beside each other: figures, and what differs in their configurations.

    A and B are job ids, run names or run folders. Medians leave out the first logged step of every attempt, which also
    warms up.
    """
    from janus_cluster.report.history import load_history
    from janus_cluster.report.summary import comparison_to_json

    one, two = (load_history(find_run(run, runs_dirs)) for run in runs)
    if as_json:
        click.echo(to_json(comparison_to_json(one, two)))
        return
    _print_comparison(one, two)


def _print_comparison(a: History, b: History) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from janus_cluster.report.summary import ROWS, compare_settings, render_value, summarize

    console = Console(highlight=False)
    # A pipe has no width: a folded table could not be searched line by line.
    console = console if console.is_terminal else Console(width=220, highlight=False)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("", a.name, b.name):
        table.add_column(Text(heading), overflow="fold")
    summaries = [summarize(h) for h in (a, b)]
    for key, label, form in ROWS:
        table.add_row(label, *(Text(render_value(s, key, form)) for s in summaries))
    differences = compare_settings(a, b)
    table.add_section()
    table.add_row("")
    for d in differences:
        table.add_row(Text(d.key), *(Text("–" if v is None else v) for v in (d.a, d.b)))
    console.print(table)
    for h in (a, b):
        console.print(*(Text(f"{h.name}: {note}") for note in h.notes), sep="\n", end="\n" if h.notes else "")
    if not differences:
        console.print(
            "configuration: no difference" if a.settings and b.settings else "configuration: not known of both"
        )


def _require_something(histories: Sequence[History]) -> None:
    for history in histories:
        if not len(history.steps) and not history.attempts:
            raise UsageError(
                f"{history.source}: no step and no attempt is recorded: there is nothing to report yet",
                hint=f"janus-cluster status {history.name}",
            )
