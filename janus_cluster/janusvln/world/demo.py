"""Writes demo episodes: walks through generated rooms to the doors that the instruction names.

    python -m janus_cluster.janusvln.world.demo OUT --episodes 24 --seed 0        the same as `janus-cluster demo-data`

Frames are drawn in perspective from the true scene, actions are a shortest way, descriptions are measured. `easy` is
one room and one of its doors, `memory` two doors one after the other, the second out of view when it is needed. Needs
numpy, pillow and click only.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from PIL import Image

from janus_cluster.errors import JanusError, UsageError, print_error
from janus_cluster.janusvln.world.layout import LEVELS
from janus_cluster.janusvln.world.render import render_view
from janus_cluster.janusvln.world.tasks import Walk, plan_walk
from janus_cluster.janusvln.world.words import render_descriptions
from janus_cluster.run.streams import run_program
from janus_cluster.run.text import to_json

MANIFEST_NAME = "demo.json"
MILESTONES_NAME = "milestones_result.json"
DEMO_VERSION = 2
DEFAULT_SIZE = (320, 240)
DEFAULT_LEVEL = "easy"


@dataclass(slots=True)
class Written:
    """The content of a demo folder. Memory frames do not show their goal, which an earlier frame showed."""

    frames: int = 0
    memory_frames: int = 0


def draw_walk(*, seed: int, index: int, level: str) -> Walk:
    """Walk `index` of a seed and level."""
    # In turn, so that left and right are equally frequent.
    return plan_walk(np.random.default_rng([seed, index]), level, first_side=(-1, 1)[index % 2])


def write_demo_episodes(
    root: Path,
    *,
    num_episodes: int,
    seed: int,
    image_size: tuple[int, int] = DEFAULT_SIZE,
    level: str = DEFAULT_LEVEL,
) -> Written:
    """Write episode folders under `root`; the same arguments give the same pixels."""
    written = Written()
    for index in range(num_episodes):
        walk = draw_walk(seed=seed, index=index, level=level)
        name = "_".join(walk.decisions[-1].goal.name.split())
        _write_episode(root / f"demo_{index:04d}_{name}", walk, image_size)
        written.frames += len(walk.decisions)
        written.memory_frames += walk.num_memory_frames
    return written


def write_demo(
    root: Path,
    *,
    num_episodes: int,
    seed: int,
    image_size: tuple[int, int] = DEFAULT_SIZE,
    level: str = DEFAULT_LEVEL,
) -> Written | None:
    """Write the demo under `root`, whole or not at all. Returns: None if it was there already.

    Raises: UsageError if `root` holds anything else, a demo of other parameters included.
    """
    parameters = {"episodes": num_episodes, "seed": seed, "image_size": list(image_size), "level": level}
    manifest = {"generator": "janus-cluster demo-data", "version": DEMO_VERSION, "parameters": parameters}
    if _holds_same_demo(root, manifest):
        return None
    building = root.parent / f".{root.name}.building-{os.getpid()}"
    try:
        building.mkdir(parents=True)
        written = write_demo_episodes(
            building, num_episodes=num_episodes, seed=seed, image_size=image_size, level=level
        )
        counts = {"frames": written.frames, "memory_frames": written.memory_frames}
        _write_json(building / MANIFEST_NAME, manifest | {"written": counts})
        building.replace(root)
    except OSError as error:
        if _holds_same_demo(root, manifest):  # another process was faster
            return None
        raise UsageError(f"{root}: the demo data cannot be written ({error})") from error
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return written


def read_parameters(root: Path) -> dict[str, Any] | None:
    """episodes, seed, image_size and level of the demo data in `root`; None where it is something else."""
    manifest = _read_manifest(root)
    parameters = None if manifest is None or manifest.get("version") != DEMO_VERSION else manifest.get("parameters")
    return parameters if isinstance(parameters, dict) else None


def _read_manifest(root: Path) -> dict[str, Any] | None:
    try:
        found = json.loads((root / MANIFEST_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _holds_same_demo(root: Path, manifest: dict[str, Any]) -> bool:
    if not root.exists():
        return False
    if not root.is_dir():
        raise UsageError(f"{root} is a file, expected a folder or nothing")
    if not any(root.iterdir()):
        return False
    found = _read_manifest(root)
    if found is None:
        what = "something else"
    elif any(found.get(key) != value for key, value in manifest.items()):
        what = f"a demo of other parameters: version {found.get('version')}, {found.get('parameters')}"
    else:
        return True
    raise UsageError(f"{root} already holds {what}", hint="name an empty or a new folder, or remove this one")


def _write_episode(folder: Path, walk: Walk, image_size: tuple[int, int]) -> None:
    folder.mkdir(parents=True)
    milestones = {
        "instruction_text": walk.instruction,
        "subinstructions": list(walk.subinstructions),
        "completion_checkpoints": [{"checkpoint_frame_index": frame} for frame in walk.checkpoints],
    }
    _write_json(folder / MILESTONES_NAME, milestones)
    for number, decision in enumerate(walk.decisions):
        stem = f"step_{number:04d}_{decision.action}"
        view = render_view(walk.scene, decision.pose, image_size)
        Image.fromarray(view.pixels).save(folder / f"{stem}.png")
        _write_json(folder / f"{stem}.json", render_descriptions(walk.house, decision.pose, view))


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def _parse_size(ctx: click.Context, param: click.Parameter, value: str) -> tuple[int, int]:
    """(width, height) of WIDTHxHEIGHT. Raises: click.BadParameter."""
    sides = value.lower().split("x")
    if len(sides) != 2 or not all(side.isdecimal() and 56 <= int(side) <= 2240 for side in sides):
        raise click.BadParameter(f"{value!r} is no WIDTHxHEIGHT of 56 to 2240 pixels, e.g. 320x240", ctx, param)
    return int(sides[0]), int(sides[1])


@click.command(
    "demo-data",
    epilog="""\b
Examples:
  janus-cluster demo-data demo_data
  janus-cluster demo-data /tmp/walks --episodes 100 --seed 7 --level memory

\b
Exit codes: 0 there, whether written now or before; 2 OUT holds something else.

\b
See also: docs/data.md
""",
)
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--episodes", type=click.IntRange(min=1), default=24, show_default=True, help="How many walks.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Other walks for another seed.")
@click.option(
    "--size",
    metavar="WxH",
    callback=_parse_size,
    default="320x240",
    show_default=True,
    help="Pixels of a frame, each side 56 to 2240.",
)
@click.option(
    "--level",
    type=click.Choice(list(LEVELS)),
    default=DEFAULT_LEVEL,
    show_default=True,
    help="easy: one door to go to. memory: then to a second one, out of view.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
def demo_data(*, out: Path, episodes: int, seed: int, size: tuple[int, int], level: str, as_json: bool) -> None:
    """Write generated episodes to OUT: rooms, instructions, shortest ways. Same arguments, same pixels.

    The format is that of real data, so the same job trains on it. OUT is written whole or not at all.
    """
    written = write_demo(out, num_episodes=episodes, seed=seed, image_size=size, level=level)
    if as_json:
        parameters = {"episodes": episodes, "seed": seed, "size": list(size), "level": level}
        frames = None if written is None else asdict(written)
        click.echo(to_json({"out": str(out), **parameters, "written": frames}))
        return
    what = f"{out}: {episodes} demo episodes (level {level}, seed {seed})"
    if written is None:
        click.echo(f"{what} already there")
    else:
        click.echo(
            f"{what} written: {written.frames} frames"
            + (f"; {written.memory_frames} do not show their goal, an earlier one did" if written.memory_frames else "")
        )


def main(arguments: list[str] | None = None) -> int:
    """The command line of this module. Returns: the exit code."""
    try:
        demo_data.main(arguments, prog_name="python -m janus_cluster.janusvln.world.demo", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except JanusError as error:
        return print_error(error)
    return 0


if __name__ == "__main__":
    run_program(main)
