"""A trained model walks episodes of the generated world: what it sees follows from what it did.

    python -m janus_cluster.training.simulation MODEL_OR_RUN --out DIR [--episodes 100] [--seed 1] [--level easy]

`janus-cluster simulate` starts this and prints DIR/simulation.json. Each episode that has ended is a line of
DIR/episodes.jsonl; a simulation that was interrupted goes on behind them.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers.utils import logging as transformers_logging

from janus_cluster.errors import JanusError, print_error
from janus_cluster.janusvln.data.tokenizer import load_tokenizer
from janus_cluster.janusvln.navigation import score_navigation
from janus_cluster.janusvln.policy import EpisodeMemory, ModelPolicy
from janus_cluster.janusvln.world.demo import DEFAULT_LEVEL, DEFAULT_SIZE, DEMO_VERSION, draw_walk, read_parameters
from janus_cluster.janusvln.world.episodes import REFERENCES, RoomEpisode, walk_to_end
from janus_cluster.run.records.training import EPISODES_JSONL, SIMULATION_JSON, SimulationRecord, WalkedEpisode
from janus_cluster.run.streams import run_program
from janus_cluster.training.evaluation import NEW_TOKENS_BY_DEFAULT, choose_device, load_model
from janus_cluster.training.subject import Subject, load_subject

PROGRESS_EVERY_S = 10.0


@dataclass(frozen=True, kw_only=True)
class Rooms:
    """The world of one simulation: the same values give the same episodes."""

    level: str
    seed: int
    image_size: tuple[int, int]
    max_steps: int
    version: int = DEMO_VERSION

    def episode(self, index: int) -> RoomEpisode:
        walk = draw_walk(seed=self.seed, index=index, level=self.level)
        return RoomEpisode(walk, image_size=self.image_size, max_steps=self.max_steps)


def main(argv: Sequence[str] | None = None) -> int:
    """The simulation is written to --out. Returns: the exit code; errors are printed on stderr."""
    arguments = _parse_arguments(argv)
    transformers_logging.disable_progress_bar()
    try:
        simulate(arguments)
    except JanusError as error:
        return print_error(error)
    except KeyboardInterrupt:
        return 130
    return 0


def simulate(arguments: argparse.Namespace) -> None:
    """The model is loaded, walks every episode that was not walked yet, and is scored. Raises: UsageError."""
    subject = load_subject(arguments.target, vggt_path=arguments.vggt_path, needs_data=False)
    rooms = choose_rooms(arguments, subject)
    device = choose_device(arguments.device)
    policy = {"model": str(subject.model), "weights": _stamp(subject.model), "answers": "action head"}
    if not subject.has_action_head:
        policy["answers"] = "words"
    record = SimulationRecord(policy=policy, world=_plain(rooms), num_episodes=arguments.episodes)
    out: Path = arguments.out
    walked = {row.index: row for row in load_walked(out, record)}
    wanted = [index for index in range(arguments.episodes) if index not in walked]
    if walked:
        _print(f"{len(walked)} episodes are walked already ({out / EPISODES_JSONL}), {len(wanted)} are left")
    else:
        _begin(out, record)
    if wanted:
        tokenizer = load_tokenizer(subject.model)
        walker = ModelPolicy(
            load_model(subject, device),
            tokenizer=tokenizer,
            data=subject.data,
            pad_history=subject.pad_history,
            four_parts=_has_four_parts(subject),
            max_new_tokens=None if subject.has_action_head else NEW_TOKENS_BY_DEFAULT,
        )
        progress = _Progress(len(wanted))
        for row in walk_episodes(walker, rooms, wanted, batch=arguments.batch):
            row.append(out / EPISODES_JSONL)
            walked[row.index] = row
            progress.step(row)
    outcomes = [walked[index] for index in range(arguments.episodes)]
    _print("the same episodes at random and on the shortest way")
    references = {}
    for name, make in REFERENCES.items():
        choose = make(rooms.seed)
        ends = [walk_to_end(rooms.episode(index), choose) for index in range(arguments.episodes)]
        references[name] = score_navigation(ends)
    done = SimulationRecord(
        policy=record.policy,
        world=record.world,
        num_episodes=arguments.episodes,
        scores=score_navigation(outcomes),
        references=references,
    )
    done.write(out / SIMULATION_JSON)
    _print(f"written: {out / SIMULATION_JSON}, {out / EPISODES_JSONL}")


def walk_episodes(policy: ModelPolicy, rooms: Rooms, indices: Sequence[int], *, batch: int) -> Iterator[WalkedEpisode]:
    """Each episode to its end, up to `batch` of them at once; a row as soon as one has ended."""
    waiting = iter(indices)
    walking: list[tuple[int, RoomEpisode, EpisodeMemory]] = []
    while True:
        for index in waiting:
            episode = rooms.episode(index)
            walking.append((index, episode, EpisodeMemory(episode.instruction)))
            if len(walking) >= batch:
                break
        if not walking:
            return
        for _, episode, memory in walking:
            policy.see(memory, episode.view())
        actions = policy.act([memory for *_, memory in walking])
        for (_, episode, _), action in zip(walking, actions, strict=True):
            episode.step(action)
        for index, episode, _ in walking:
            if episode.is_over:
                yield WalkedEpisode(
                    index=index,
                    instruction=episode.instruction,
                    actions=tuple(episode.actions),
                    **asdict(episode.outcome()),
                )
        walking = [entry for entry in walking if not entry[1].is_over]


def choose_rooms(arguments: argparse.Namespace, subject: Subject) -> Rooms:
    """The rooms that the options name; where they do not, those of the demo data that the model was trained on, with
    other walks.
    """
    own = next((found for root in subject.data.roots if (found := read_parameters(Path(root.path)))), {})
    seed = arguments.seed if arguments.seed is not None else int(own.get("seed", 0)) + 1
    level = arguments.level or str(own.get("level", DEFAULT_LEVEL))
    if own and (seed, level) == (own.get("seed"), own.get("level")):
        _print(f"warning: the first {own.get('episodes')} walks of seed {seed} are in the training data")
    width, height = arguments.size or own.get("image_size") or DEFAULT_SIZE
    return Rooms(level=level, seed=seed, image_size=(int(width), int(height)), max_steps=arguments.max_steps)


def load_walked(out: Path, record: SimulationRecord) -> list[WalkedEpisode]:
    """The episodes that this policy has walked in this world; [] where the folder is of another."""
    earlier = SimulationRecord.load(out / SIMULATION_JSON)
    if earlier is None or (earlier.policy, earlier.world) != (record.policy, record.world):
        return []
    return [row for row in WalkedEpisode.load_lines(out / EPISODES_JSONL) if row.index < record.num_episodes]


def _begin(out: Path, record: SimulationRecord) -> None:
    """The folder is of this simulation, without an episode."""
    out.mkdir(parents=True, exist_ok=True)
    (out / EPISODES_JSONL).unlink(missing_ok=True)
    record.write(out / SIMULATION_JSON)


def _stamp(model: Path) -> str:
    """A hash of which weights they are: names, sizes and times of the files."""
    files = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(model.glob("*.safetensors"))]
    return hashlib.sha256(repr(files).encode()).hexdigest()[:16]


def _plain(rooms: Rooms) -> Mapping[str, Any]:
    return asdict(rooms) | {"image_size": list(rooms.image_size), "name": "rooms"}


def _has_four_parts(subject: Subject) -> bool:
    """Whether the training data's answers have four parts; the generated rooms' have."""
    return not subject.held_out_only or subject.load_samples().samples[0].has_four_parts


class _Progress:
    """Reports now and then how many episodes have ended, how many of them well, and the time."""

    def __init__(self, total: int) -> None:
        self._total, self._done, self._hits = total, 0, 0
        self._began_s = self._reported_s = time.perf_counter()

    def step(self, row: WalkedEpisode) -> None:
        self._done, self._hits = self._done + 1, self._hits + row.is_success
        now_s = time.perf_counter()
        if self._done == self._total or now_s - self._reported_s > PROGRESS_EVERY_S:
            self._reported_s = now_s
            took_s = now_s - self._began_s
            _print(f"{self._done} of {self._total} episodes, {self._hits} of them successful, {took_s:.0f} s")


def _print(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m janus_cluster.training.simulation", description=__doc__)
    parser.add_argument("target", type=Path, metavar="MODEL_OR_RUN", help="run folder, or exported folder")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--episodes", type=int, default=100)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--level")
    parser.add_argument("--size", type=lambda text: tuple(map(int, text.split("x"))))
    parser.add_argument("--max-steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--device", choices=["cpu", "cuda"])
    parser.add_argument("--vggt-path")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_program(main)
