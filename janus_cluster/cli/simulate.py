"""simulate: let a trained model walk through generated rooms, in a process of its own (it needs torch)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click

from janus_cluster.cli.evaluate import find_target, require_torch, run_module
from janus_cluster.cli.options import runs_dir_option
from janus_cluster.run.text import to_json

if TYPE_CHECKING:
    from rich.table import Table

    from janus_cluster.run.records.training import Measure, NavigationScores, SimulationRecord

MODULE = "janus_cluster.training.simulation"
LEVELS = ("easy", "memory")


@click.command(
    "simulate",
    epilog="""\b
Examples:
  janus-cluster simulate demo                    its newest run; none of the walks was trained on
  janus-cluster simulate 4711 --episodes 500 --batch 32
  janus-cluster simulate /models/mine --level memory --json
  srun --gres=gpu:1 janus-cluster simulate 4711  the same on a GPU node

\b
See also: docs/evaluation.md
""",
)
@click.argument("model_or_run")
@click.option("--episodes", type=click.IntRange(min=1), default=100, show_default=True, help="How many walks.")
@click.option("--level", type=click.Choice(LEVELS), help="Default: that of the run's demo data, or easy.")
@click.option("--seed", type=click.IntRange(min=0), help="Of the walks. Default: one more than the training data's.")
@click.option(
    "--max-steps", type=click.IntRange(min=1), default=40, show_default=True, help="A walk without STOP ends then."
)
@click.option("--batch", type=click.IntRange(min=1), default=8, show_default=True, help="Walks at once.")
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder of the result. Default: <run>/simulation, or ./simulation for an exported model.",
)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="Default: cuda where there is a GPU.")
@click.option("--vggt-path", metavar="PATH", help="VGGT-1B's weights, in place of the model's own.")
@runs_dir_option
@click.option("--json", "as_json", is_flag=True, help="Print simulation.json and nothing else.")
def simulate(
    *,
    model_or_run: str,
    episodes: int,
    level: str | None,
    seed: int | None,
    max_steps: int,
    batch: int,
    out: Path | None,
    device: str | None,
    vggt_path: str | None,
    runs_dirs: list[Path],
    as_json: bool,
) -> int:
    """Let a trained model walk through generated rooms: success rate, SPL and the like, with 95 % intervals.

    MODEL_OR_RUN is a run (its folder, name or job id), or an exported folder. The model's action head chooses each
    step; a model without one is asked in words. Beside it stand the same walks at random and on the shortest way.
    A simulation that was interrupted goes on with the same line.
    """
    target, run = find_target(model_or_run, runs_dirs)
    folder = (out or (Path("simulation") if run is None else run.simulation)).absolute()
    options: dict[str, object] = {
        "--episodes": episodes,
        "--level": level,
        "--seed": seed,
        "--max-steps": max_steps,
        "--batch": batch,
        "--device": device,
        "--vggt-path": vggt_path,
        "--out": folder,
    }
    from janus_cluster.run.records.training import EPISODES_JSONL, SIMULATION_JSON, SimulationRecord

    require_torch("simulate")
    code = run_module(MODULE, target, options)
    if code != 0:
        return code
    simulation = SimulationRecord.require(folder / SIMULATION_JSON)
    if as_json:
        click.echo(to_json(simulation.to_json()))
    elif simulation.scores is not None:
        _print_simulation(simulation, simulation.scores)
        click.echo(f"result {folder / SIMULATION_JSON}\nwalks  {folder / EPISODES_JSONL}")
    return 0


def _print_simulation(simulation: SimulationRecord, scores: NavigationScores) -> None:
    from rich.console import Console

    console = Console()
    console.print(_table(simulation, scores))
    if missed := scores.num_never_stopped:
        most = simulation.world["max_steps"]
        console.print(f"{missed} walks had no STOP within {most} steps", highlight=False, soft_wrap=True)


def _table(simulation: SimulationRecord, scores: NavigationScores) -> Table:
    from rich.table import Table

    world, references = simulation.world, simulation.references
    title = f"{simulation.num_episodes} walks, level {world['level']}, seed {world['seed']}"
    table = Table(title=title, title_justify="left")
    for column in ("", "model", "95 % interval", *references):
        table.add_column(column, justify="right" if column else "left")
    for key, (label, digits) in ROWS.items():
        own: Measure = getattr(scores, key)
        interval = "—" if own.low is None else f"{own.low:.{digits}f} to {own.high:.{digits}f}"
        others = (f"{getattr(other, key).mean:.{digits}f}" for other in references.values())
        table.add_row(label, f"{own.mean:.{digits}f}", interval, *others)
    return table


# What is shown, in this order: key, label, digits.
ROWS: Mapping[str, tuple[str, int]] = {
    "success_rate": ("success rate", 3),
    "spl": ("SPL", 3),
    "oracle_success_rate": ("oracle success rate", 3),
    "navigation_error_m": ("navigation error (m)", 2),
    "path_m": ("path (m)", 2),
    "steps": ("steps", 1),
}
