"""Files of training besides metrics.jsonl.

data.json, bad_data.jsonl, a checkpoint's manifest.json, janus_data.json beside exported weights, evaluation.json,
simulation.json and its episodes.jsonl.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from janus_cluster.run.files import write_text_atomically
from janus_cluster.run.records.base import STRICT, Record


@dataclass(frozen=True, kw_only=True)
class SplitRecord(Record):
    """Which walks (or episodes, by name) a run holds out, and how much of that split leaks."""

    SCHEMA_VERSION: ClassVar[int | None] = None

    held_out: tuple[str, ...]
    by: Literal["walk", "episode"]
    key: str = ""
    num_walks: int = 0
    num_held_out_walks: int = 0
    num_held_out_frames: int = 0
    num_leaked_frames: int = 0
    num_shared_episodes: int = 0


@dataclass(frozen=True, kw_only=True)
class SamplesRecord(Record):
    """How many samples there were, and a hash of which."""

    SCHEMA_VERSION: ClassVar[int | None] = None

    num_samples: int
    fingerprint: str


@dataclass(frozen=True, kw_only=True)
class DataRecord(Record):
    """data.json: the samples that the newest attempt draws from. `split`: None in the runs of versions without one.

    `accepted`: the samples before a change that restart.accept_changed_data has not accepted yet.
    """

    num_samples: int
    fingerprint: str
    accepted: SamplesRecord | None = None
    # Another split in its place would train on what is held out.
    split: SplitRecord | None = field(default=None, metadata=STRICT)


@dataclass(frozen=True, kw_only=True)
class CheckpointFile(Record):
    """A file as it was written."""

    SCHEMA_VERSION: ClassVar[int | None] = None

    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class CheckpointManifest(Record):
    """checkpoint-<step>/manifest.json, written last: a folder without it is not whole. Units: epoch seconds."""

    SCHEMA_VERSION: ClassVar[int | None] = 2

    step: int
    world_size: int | None = None
    written_at: float | None = None
    zero_stage: int | None = None
    processes_per_node: int | None = None
    effective_batch_size: int | None = None
    files: Mapping[str, CheckpointFile]

    @property
    def num_bytes(self) -> int:
        return sum(file.bytes for file in self.files.values())


@dataclass(frozen=True, kw_only=True)
class BadDataRecord(Record):
    """A line of bad_data.jsonl: what could not be used, why, and how many samples are lost by it."""

    SCHEMA_VERSION: ClassVar[int | None] = None

    path: str
    reason: str
    samples_lost: int
    absent: bool = False

    def to_json(self) -> dict[str, Any]:
        """The object of the line; only a trajectory without frames is marked as absent."""
        return {key: value for key, value in super().to_json().items() if key != "absent" or value}


def write_bad_data(path: Path, records: Iterable[BadDataRecord]) -> None:
    """The file holds a line for each record, or what it held before. Raises: OSError."""
    write_text_atomically(path, "".join(json.dumps(record.to_json()) + "\n" for record in records))


@dataclass(frozen=True, kw_only=True)
class PreparationRecord(Record):
    """janus_data.json beside exported weights: how the frames and the history of the model's data were prepared.

    compat, vggt_path and data: as in the job.
    """

    compat: Literal["none", "predecessor"]
    vggt_path: str | None
    data: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Outcome(Record):
    """How an episode in a world ended. Units: metres.

    is_success:  STOP in front of the last goal, after all the others.
    was_there:   in front of the last goal at any time, after all the others (oracle success).
    path_m, shortest_m: walked forwards, and on the shortest way. error_m: from the end to the middle of the last goal.
    """

    SCHEMA_VERSION: ClassVar[int | None] = None

    is_success: bool
    was_there: bool
    has_stopped: bool
    steps: int
    shortest_steps: int
    path_m: float
    shortest_m: float
    error_m: float

    @property
    def spl(self) -> float:
        """Success weighted by path length. Source: Anderson et al., arXiv 1807.06757."""
        return float(self.is_success) * self.shortest_m / max(self.path_m, self.shortest_m)


@dataclass(frozen=True, kw_only=True)
class WalkedEpisode(Outcome):
    """A line of episodes.jsonl: an episode that a policy walked, and how it ended."""

    index: int
    instruction: str
    actions: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Measure(Record):
    """A mean and the bounds of its 95 % confidence interval; no bounds of a single episode's mean."""

    SCHEMA_VERSION: ClassVar[int | None] = None

    mean: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, kw_only=True)
class NavigationScores(Record):
    """How well a policy navigates. Units: navigation_error_m and path_m metres; rates and SPL from 0 to 1."""

    SCHEMA_VERSION: ClassVar[int | None] = None

    num_episodes: int
    success_rate: Measure
    spl: Measure
    oracle_success_rate: Measure
    navigation_error_m: Measure
    path_m: Measure
    steps: Measure
    num_never_stopped: int


SIMULATION_JSON = "simulation.json"
EPISODES_JSONL = "episodes.jsonl"


@dataclass(frozen=True, kw_only=True)
class SimulationRecord(Record):
    """simulation.json: the world, the policy, and how well it navigates, as `simulate --json` prints it.

    `scores` is None until all episodes are walked. `references`: what other policies score on them. An interrupted
    simulation of the same `policy` and `world` goes on behind the episodes that it has.
    """

    policy: Mapping[str, Any]
    world: Mapping[str, Any]
    num_episodes: int
    scores: NavigationScores | None = None
    references: Mapping[str, NavigationScores] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class EvaluationRecord(Record):
    """evaluation.json: the scores of a model, as `eval --json` prints them."""

    WHOLE: ClassVar[str | None] = "scores"

    scores: Mapping[str, Any]
