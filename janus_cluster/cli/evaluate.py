"""eval: start the evaluation of a trained model in a process of its own (it needs torch), and print its result."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from janus_cluster.cli.options import runs_dir_option
from janus_cluster.errors import UsageError
from janus_cluster.run.text import to_json

if TYPE_CHECKING:
    from rich.table import Table

    from janus_cluster.run.paths import RunDir

MODULE = "janus_cluster.training.evaluation"
FILES = ("evaluation.json", "predictions.html", "predictions.jsonl")
# A text of so high a perplexity has not been learned: every token of it is one of so many.
_UNLEARNED = 10.0


@click.command(
    "eval",
    epilog="""\b
Examples:
  janus-cluster eval demo                                its newest run, held-out episodes
  janus-cluster eval 4711 --generate 200 --out report
  janus-cluster eval /models/mine --data /data/r2r_val   an exported model, every episode there
  janus-cluster eval /models/mine --data '{path: /data/r2r/train.json.gz, images: /frames/r2r}'
  srun --gres=gpu:1 janus-cluster eval 4711              the same on a GPU node

\b
See also: docs/evaluation.md
""",
)
@click.argument("model_or_run")
@click.option(
    "--data",
    "roots",
    multiple=True,
    metavar="ROOT",
    help="Data set: a path, or {path: …, images: …} as in data.roots; may be repeated. Default: the run's own.",
)
@click.option(
    "--samples", type=click.IntRange(min=1), help="Only this many samples, drawn the same way each time. Default: all."
)
@click.option(
    "--generate",
    type=click.IntRange(min=0),
    default=50,
    show_default=True,
    help="How many of the samples are also answered as text (slow).",
)
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=256, show_default=True, help="Longest answer.")
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder of the report. Default: <run>/evaluation, or ./evaluation for an exported model.",
)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="Default: cuda where there is a GPU.")
@click.option("--vggt-path", metavar="PATH", help="VGGT-1B's weights, in place of the model's own.")
@runs_dir_option
@click.option("--json", "as_json", is_flag=True, help="Print evaluation.json and nothing else.")
def evaluate(
    *,
    model_or_run: str,
    roots: tuple[str, ...],
    samples: int | None,
    generate: int,
    max_new_tokens: int,
    out: Path | None,
    device: str | None,
    vggt_path: str | None,
    runs_dirs: list[Path],
    as_json: bool,
) -> int:
    """Judge a trained model on episodes it has not seen: actions, F1, perplexity, and samples with their pictures.

    MODEL_OR_RUN is an exported folder (then with --data), or a run: its folder, name or job id.
    """
    target, run = find_target(model_or_run, runs_dirs)
    folder = (out or (Path("evaluation") if run is None else run.evaluation)).absolute()
    options: dict[str, object] = {
        "--samples": samples,
        "--generate": generate,
        "--max-new-tokens": max_new_tokens,
        "--device": device,
        "--vggt-path": vggt_path,
        "--out": folder,
    }
    from janus_cluster.run.records.training import EvaluationRecord

    require_torch("eval")
    code = run_module(MODULE, target, options, more=[f"--data={root}" for root in roots])
    if code != 0:
        return code
    evaluation = EvaluationRecord.require(folder / FILES[0]).to_json()
    if as_json:
        click.echo(to_json(evaluation))
    else:
        _print_evaluation(evaluation, folder)
    return 0


def run_module(module: str, target: Path, options: Mapping[str, object], *, more: Sequence[str] = ()) -> int:
    """Run `python -m module target` with the options that are given. Returns: the exit code as a shell has it."""
    command = [sys.executable, "-m", module, str(target)]
    command += [f"{name}={value}" for name, value in options.items() if value is not None]
    code = _run_with_own_folder([*command, *more])
    return code if code >= 0 else 128 - code


def _run_with_own_folder(command: Sequence[str]) -> int:
    """Run it, with a temporary folder of its own where $TMPDIR cannot hold what the loaders need. Returns: exit code.

    Its progress goes to stderr: stdout is the result.
    """
    from janus_cluster.node.temporary import make_private_folder, remove_private_folder

    private = make_private_folder(os.environ)
    if private is None:
        return subprocess.run(command, stdout=sys.stderr, check=False).returncode
    print(f"{private.name}={private.value}    # {private.reason}", file=sys.stderr)
    try:
        environ = os.environ | {private.name: private.value}
        return subprocess.run(command, stdout=sys.stderr, env=environ, check=False).returncode
    finally:
        remove_private_folder(private)


def find_target(name: str, runs_dirs: list[Path]) -> tuple[Path, RunDir | None]:
    """The exported folder or run folder that is meant, and the run.

    Raises: JobNotFound, naming near matches.
    """
    from janus_cluster.observe.find import find_run

    path = Path(os.path.expanduser(name))
    if (path / "config.json").is_file():
        return path.absolute(), None
    run = find_run(name, runs_dirs)
    return run.path, run


def require_torch(command: str) -> None:
    """This Python has torch. Raises: UsageError naming the command that needs it."""
    if importlib.util.find_spec("torch") is None:
        raise UsageError(
            f"{command} needs torch, and {sys.executable} has none",
            hint="pip install 'janus-cluster[train]', or start it in the environment of the nodes",
        )


def _print_evaluation(evaluation: Mapping[str, Any], folder: Path) -> None:
    from rich.console import Console

    console = Console()
    console.print(_summary_table(evaluation))
    if (not_scored := evaluation["head_not_scored"]) is not None:
        console.print(f"action head: {not_scored}", highlight=False, markup=False, soft_wrap=True)
    else:
        console.print(_action_table("action head", evaluation["actions"], evaluation["head"]))
    if evaluation["generated"] is not None:
        console.print(_action_table("in words", evaluation["actions"], evaluation["generated"]))
        if (note := _note_on_words(evaluation)) is not None:
            console.print(note, highlight=False, markup=False, soft_wrap=True)
    if not_scored is None:
        console.print(_confusion_table(evaluation))
    console.print(_perplexity_table(evaluation))
    page = folder / FILES[1]
    console.print(f"report {folder}\npage   {page}", highlight=False, markup=False, soft_wrap=True)


def _note_on_words(evaluation: Mapping[str, Any]) -> str | None:
    """Why no answer names an action, where none does."""
    generated, perplexity = evaluation["generated"], evaluation["perplexity_by_segment"].get("action")
    if generated["num_unparsable"] < generated["num_samples"] or perplexity is None or perplexity < _UNLEARNED:
        return None
    return (
        f"in words: no answer names an action, which is expected at a perplexity of {perplexity:.0f} of its text; the "
        "action head is trained beside the text, and is judged apart"
    )


def _summary_table(evaluation: Mapping[str, Any]) -> Table:
    from rich.table import Table

    head, generated, majority = evaluation["head"], evaluation["generated"], evaluation["majority"]
    kind = "held-out " if evaluation["held_out_only"] else ""
    title = f"{evaluation['num_samples']} {kind}samples of {evaluation['num_episodes']} episodes"
    table = Table(title=title, title_justify="left")
    for column in ("", "action head", "in words"):
        table.add_column(column, justify="left" if not column else "right")
    given = generated or {}
    if evaluation["head_not_scored"] is not None:
        head = {"num_samples": "not scored", "accuracy": None, "macro_f1": None}
    table.add_row("samples", str(head["num_samples"]), str(given.get("num_samples", "—")))
    table.add_row("action accuracy", _number(head["accuracy"]), _number(given.get("accuracy")))
    table.add_row("macro F1", _number(head["macro_f1"]), _number(given.get("macro_f1")))
    table.add_row("answers that name no action", "—", str(given.get("num_unparsable", "—")))
    if (split := evaluation["split"]) is not None:
        leaked = f"{split['num_leaked_frames']} of {split['num_held_out_frames']}"
        table.add_row("held-out frames that are trained on", leaked, leaked)
        shared = f"{split['num_shared_episodes']}"
        table.add_row("held-out episodes of walks trained on", shared, shared)
    table.add_row(f"always {majority['action']}", _number(majority["accuracy"]), "—")
    return table


def _perplexity_table(evaluation: Mapping[str, Any]) -> Table:
    from rich.table import Table

    table = Table(title="perplexity of the true text, all samples", title_justify="left")
    for segment in evaluation["perplexity_by_segment"]:
        table.add_column(segment, justify="right")
    table.add_row(*map(_number, evaluation["perplexity_by_segment"].values()))
    return table


def _action_table(title: str, actions: Sequence[str], scores: Mapping[str, Any]) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for column in ("", "precision", "recall", "F1", "samples"):
        table.add_column(column, justify="right" if column else "left")
    for action in actions:
        score = scores["by_action"][action]
        table.add_row(action, *(_number(score[key]) for key in ("precision", "recall", "f1")), str(score["support"]))
    return table


def _confusion_table(evaluation: Mapping[str, Any]) -> Table:
    from rich.table import Table

    table = Table(title="action head: true action by row, given action by column", title_justify="left")
    table.add_column("")
    for action in evaluation["actions"]:
        table.add_column(action, justify="right")
    for action, row in zip(evaluation["actions"], evaluation["head"]["confusion"], strict=True):
        table.add_row(action, *map(str, row[: len(evaluation["actions"])]))
    return table


def _number(value: float | None) -> str:
    return "—" if value is None else f"{value:.3f}"
