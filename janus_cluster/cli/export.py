"""export: start a process that writes a trained model in another layout (it needs torch), and print what it wrote."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import click

from janus_cluster.cli.evaluate import find_target, require_torch
from janus_cluster.cli.options import runs_dir_option
from janus_cluster.errors import UsageError
from janus_cluster.run.next_command import command_for
from janus_cluster.run.text import to_json

MODULE = "janus_cluster.training.published"


@click.command(
    "export",
    epilog="""\b
Examples:
  janus-cluster export demo                     its newest run, into <run>/export-janusvln
  janus-cluster export 4711 --out /models/mine
  janus-cluster export /models/export --out /models/mine --vggt-path /models/VGGT-1B

\b
See also: docs/evaluation.md
""",
)
@click.argument("model_or_run")
@click.option(
    "--layout",
    type=click.Choice(["janusvln"]),
    default="janusvln",
    show_default=True,
    help="janusvln: as JanusVLN was published, for its own evaluator (transformers 4.5x, VGGT inside).",
)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    help="New or empty folder. Default: <run>/export-janusvln, written anew; <folder>-janusvln for an exported model.",
)
@click.option("--vggt-path", metavar="PATH", help="VGGT-1B's weights, where neither the model nor its run knows them.")
@runs_dir_option
@click.option("--json", "as_json", is_flag=True, help="Print its folder and its files, as one JSON object.")
def export(
    *,
    model_or_run: str,
    layout: str,
    out: Path | None,
    vggt_path: str | None,
    runs_dirs: list[Path],
    as_json: bool,
) -> int:
    """Write a trained model in the published layout of JanusVLN: VGGT inside, configuration and tokenizer of 4.50.

    MODEL_OR_RUN is an exported folder, or a run: its folder, name or job id.
    """
    model, folder = _find_folders(model_or_run, runs_dirs, out)
    require_torch("export")
    command = [sys.executable, "-m", MODULE, str(model), f"--out={folder}"]
    if vggt_path is not None:
        command.append(f"--vggt-path={vggt_path}")
    # Its progress goes to stderr: stdout is the result.
    code = subprocess.run(command, stdout=sys.stderr, check=False).returncode
    if code != 0:
        return code if code > 0 else 128 - code
    files = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    if as_json:
        click.echo(to_json({"layout": layout, "model": str(model), "path": str(folder), "files_bytes": files}))
    else:
        click.echo(f"{folder}: {len(files)} files, {sum(files.values()) / 1e9:.2f} GB, layout {layout}")
        click.echo("for the evaluator that takes it and its settings: docs/evaluation.md")
    return 0


def _find_folders(name: str, runs_dirs: list[Path], out: Path | None) -> tuple[Path, Path]:
    """The exported model, and where it is to be written. Raises: UsageError where there is none, or files are there."""
    from janus_cluster.run.current import has_bundles
    from janus_cluster.run.paths import RunDir

    target, _ = find_target(name, runs_dirs)
    run = RunDir(target)
    is_run = has_bundles(run)
    model = run.export if is_run else target
    if not (model / "config.json").is_file():
        raise UsageError(
            f"{run.path} has no export: training has not finished, or checkpoint.export was false",
            hint=command_for("status", run),
        )
    if out is None and is_run:
        return model, run.published_export
    folder = (out or target.with_name(f"{target.name}-janusvln")).absolute()
    if folder.exists() and any(folder.iterdir()):
        raise UsageError(f"{folder} is not empty, and nothing is overwritten", hint="--out NEW_FOLDER")
    return model, folder
