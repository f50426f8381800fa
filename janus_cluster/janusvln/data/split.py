"""Which samples are held out: whole walks, so that no frame of a held-out walk is trained on.

Episodes are of one walk if they share a key (formats/walks.py), a name, or frames of the same content. A name that is a
number counts within one folder of episodes only: 17 of R2R is not 17 of RxR.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from janus_cluster.janusvln.data.formats.walks import NO_SCENE, TRAJECTORY
from janus_cluster.janusvln.data.table import Indices, SampleTable, group_frames, unique_pairs
from janus_cluster.run.next_command import submit_command
from janus_cluster.run.paths import RunDir
from janus_cluster.run.records.training import DataRecord, SplitRecord

Rule = Literal["walk", "episode"]
BY_KEY, BY_NAME, BY_FRAMES = "trajectory and scene, or path and scene", "episode name", "frames of the same content"


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldOut:
    """The walks that are held out, and by which rule. `key`: what distinguished the walks.

    `num_frames` are shown by held-out samples; `num_leaked` of them have the content of a training frame. `num_shared`:
    held-out episodes whose walk is trained on. `lost`: walks that an earlier attempt held out and that are no longer
    among the data.
    """

    by: Rule
    key: str
    num_walks: int
    walks: tuple[str, ...]
    num_frames: int
    num_leaked: int
    num_shared: int = 0
    lost: tuple[str, ...] = ()

    def describe(self) -> str:
        """A line for a log."""
        if not self.num_walks:
            return "nothing is held out: data.validation_fraction is 0"
        text = f"split by {self.by} (key: {self.key}): {len(self.walks):,} of {self.num_walks:,} {self.by}s held out"
        if self.walks:
            leaked = f"{self.num_leaked:,}" if self.num_leaked else "none"
            text += (
                f"; of their {self.num_frames:,} frames {leaked} {'is' if self.num_leaked == 1 else 'are'} trained on"
            )
        if self.lost:
            text += f"; {len(self.lost):,} that were held out before are not in the data any more: {self.lost[0]}, …"
        return text

    def to_record(self) -> SplitRecord:
        """The `split` of data.json."""
        return SplitRecord(held_out=self.walks, **self.counts())

    def counts(self) -> dict[str, Any]:
        """How the split was made, and how much of it leaks; the `split` of evaluation.json."""
        return {
            "by": self.by,
            "key": self.key,
            "num_walks": self.num_walks,
            "num_held_out_walks": len(self.walks),
            "num_held_out_frames": self.num_frames,
            "num_leaked_frames": self.num_leaked,
            "num_shared_episodes": self.num_shared,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class EarlierSplit:
    """What a run held out before: its next attempts and its evaluation hold out the same.

    Without `walks`, what the rule chooses.
    """

    by: Rule
    walks: frozenset[str] | None = None

    @classmethod
    def of(cls, record: SplitRecord | None) -> EarlierSplit:
        """Of the `split` of data.json; runs that wrote none had chosen episodes by their names."""
        return cls(by="episode") if record is None else cls(by=record.by, walks=frozenset(record.held_out))


def load_earlier_split(run: RunDir) -> EarlierSplit:
    """What a run that is resumed, or evaluated, held out before. Raises: JanusError for a broken data.json."""
    return EarlierSplit.of(DataRecord.require(run.data_json).split if run.data_json.exists() else None)


def warn_of_leak(held_out: HeldOut, run: RunDir) -> str | None:
    """A warning where a run's held-out episodes were chosen one by one and their walks are trained on too."""
    if held_out.by == "walk" or not (held_out.num_leaked or held_out.num_shared):
        return None
    return (
        f"this run's held-out samples leak: {held_out.num_shared:,} of its held-out episodes are of walks that are "
        f"trained on too, and {held_out.num_leaked:,} of their {held_out.num_frames:,} frames are training frames. Its "
        "scores are no measure for new walks. An older version chose them; they are kept, since the weights have "
        "seen the other episodes\n"
        f"  a clean split needs a new run: {submit_command(run)}\n"
        f"  or judge the model on other data: janus-cluster eval {run.name} --data /path/to/unseen"
    )


def hold_out(
    table: SampleTable, *, fraction: float, seed: int, earlier: EarlierSplit | None = None
) -> tuple[NDArray[np.bool_], HeldOut]:
    """True where a sample is held out, and what that split is."""
    if fraction <= 0:
        return np.zeros(len(table), np.bool_), HeldOut(
            by="walk", key="", num_walks=0, walks=(), num_frames=0, num_leaked=0
        )
    episodes = _Episodes.of(table)
    by: Rule = "walk" if earlier is None else earlier.by
    walks, key = _walks(table, episodes)
    groups = walks if by == "walk" else _by_name(episodes)
    labels = _label(groups, episodes) if by == "walk" else {n: episodes.names[n] for n in groups.tolist()}
    if earlier is None or earlier.walks is None:
        chosen, lost = choose_held_out(labels.values(), fraction=fraction, seed=seed), frozenset[str]()
    else:
        chosen = earlier.walks & frozenset(labels.values())
        lost = earlier.walks - chosen
    held_groups = np.array([group for group, label in labels.items() if label in chosen], dtype=np.int64)
    is_held = np.isin(groups, held_groups)
    mask = is_held[episodes.of_sample]
    shared = np.isin(walks[is_held], walks[~is_held])
    num_frames, num_leaked = _count_leaks(table, mask)
    return mask, HeldOut(
        by=by,
        key=key if by == "walk" else BY_NAME,
        num_walks=len(labels),
        walks=tuple(sorted(chosen)),
        num_frames=num_frames,
        num_leaked=num_leaked,
        num_shared=int(shared.sum()),
        lost=tuple(sorted(lost)),
    )


def choose_held_out(walks: Iterable[str], *, fraction: float, seed: int) -> frozenset[str]:
    """Names of the held-out walks: the share with the lowest hash of seed and name.

    With a fraction above 0 and two walks or more, at least one is held out and at least one is trained on. A new walk
    moves few of the others from one side to the other.
    """
    names = sorted(set(walks))
    if fraction <= 0 or len(names) < 2:
        return frozenset()
    count = min(max(round(fraction * len(names)), 1), len(names) - 1)

    def rank(name: str) -> bytes:
        return hashlib.sha256(f"{seed}:{name}".encode("utf-8", "surrogateescape")).digest()

    return frozenset(sorted(names, key=rank)[:count])


@dataclass(frozen=True, slots=True)
class _Episodes:
    """The table's episodes: name and keys of each, and the episode of each sample. `folders`: where a name that is a
    number counts, empty for others.
    """

    names: Sequence[str]
    keys: Sequence[Sequence[str]]
    folders: Sequence[str]
    of_sample: Indices

    @classmethod
    def of(cls, table: SampleTable) -> _Episodes:
        numbers, first, of_sample = np.unique(table.episode_numbers(), return_index=True, return_inverse=True)
        all_names = [store.episode_names() for store in table.stores]
        all_keys = [store.episode_keys() for store in table.stores]
        at = [(int(number) >> 32, int(number) & 0xFFFFFFFF) for number in numbers]
        names = [all_names[root][number] for root, number in at]
        keys = [all_keys[root][number] for root, number in at]
        folders = [
            str(table[int(row)].frames[-1].parent.parent) if name.isdecimal() and not own else ""
            for name, own, row in zip(names, keys, first, strict=True)
        ]
        return cls(names, keys, folders, of_sample)


class _Groups:
    """Union of episodes by what they have in common."""

    def __init__(self, count: int) -> None:
        self._parent = list(range(count))
        self._first: dict[Hashable, int] = {}

    def find(self, member: int) -> int:
        root = member
        while self._parent[root] != root:
            root = self._parent[root]
        while self._parent[member] != root:
            self._parent[member], member = root, self._parent[member]
        return root

    def join(self, one: int, other: int) -> bool:
        """The two are in one group. Returns: whether they were not before."""
        one, other = self.find(one), self.find(other)
        self._parent[max(one, other)] = min(one, other)
        return one != other

    def join_by(self, key: Hashable, member: int) -> bool:
        """The member is in the group of all that have this key."""
        return self.join(self._first.setdefault(key, member), member)

    def numbers(self) -> Indices:
        return np.array([self.find(member) for member in range(len(self._parent))], dtype=np.int64)


def _by_name(episodes: _Episodes) -> Indices:
    groups = _Groups(len(episodes.names))
    for number, name in enumerate(episodes.names):
        groups.join_by(name, number)
    return groups.numbers()


def _walks(table: SampleTable, episodes: _Episodes) -> tuple[Indices, str]:
    """The number of each episode's walk, and what distinguished the walks."""
    groups = _Groups(len(episodes.names))
    used = set()
    unplaced = {key.partition(" in ")[0] for keys in episodes.keys for key in keys if _is_unplaced(key)}
    for number, (name, keys, folder) in enumerate(zip(episodes.names, episodes.keys, episodes.folders, strict=True)):
        for key in keys:
            groups.join_by(key, number)
            # An episode without a scene may mean the trajectory of that number in any.
            if key.partition(" in ")[0] in unplaced:
                groups.join_by(key.partition(" in ")[0], number)
        if not keys:
            groups.join_by(("name", name, folder), number)
        used.add(BY_KEY if keys else BY_NAME)
    if _join_by_frames(table, episodes, groups):
        used.add(BY_FRAMES)
    return groups.numbers(), "; ".join(kind for kind in (BY_KEY, BY_NAME, BY_FRAMES) if kind in used)


def _is_unplaced(key: str) -> bool:
    return key.startswith(f"{TRAJECTORY} ") and key.endswith(f" in {NO_SCENE}")


def _join_by_frames(table: SampleTable, episodes: _Episodes, groups: _Groups) -> bool:
    """Join episodes that show frames of the same content. Returns: whether any were joined.

    A picture that occurs twice in one episode, or in most groups (such as an all-black one), identifies no place;
    episodes that consist of the same pictures are joined by those too.
    """
    of_episode, frames, repeated = _frames_of_episodes(table, episodes)
    joined = False
    for number, own in _cut_at_changes(of_episode, frames):
        if len(own) > 1:
            joined |= groups.join_by(("frames", own.tobytes()), number)
    frames, group = unique_pairs(frames, groups.numbers()[of_episode])
    _, which, times = np.unique(frames, return_inverse=True, return_counts=True)
    identifies = (times[which] <= max(2, len(np.unique(group)) // 2)) & ~np.isin(frames, repeated)
    frames, group = frames[identifies], group[identifies]
    same = np.flatnonzero(frames[1:] == frames[:-1])
    for one, other in zip(*unique_pairs(group[same], group[same + 1]), strict=True):
        joined |= groups.join(int(one), int(other))
    return joined


def _cut_at_changes(keys: Indices, values: Indices) -> Iterator[tuple[int, Indices]]:
    """Each key of sorted `keys` with its values."""
    starts = np.flatnonzero(np.diff(keys, prepend=-1))
    for start, end in pairwise([*starts.tolist(), len(keys)]):
        yield int(keys[start]), values[start:end]


def _frames_of_episodes(table: SampleTable, episodes: _Episodes) -> tuple[Indices, Indices, Indices]:
    """Episodes and the contents that each shows, each pair once and in order; contents that a sequence shows twice."""
    parts = [
        group_frames(store, table.rows[own], episodes.of_sample[own])
        for root, store in enumerate(table.stores)
        if (own := table.root_index == root).any()
    ]
    episode, content = (np.concatenate([getattr(part, name) for part in parts]) for name in ("group", "fingerprint"))
    is_known = content != 0  # 0: the file could not be read
    repeated = np.concatenate([part.repeated for part in parts])
    return *unique_pairs(episode[is_known], content[is_known]), repeated


def _label(groups: Indices, episodes: _Episodes) -> dict[int, str]:
    """A name for each group that does not depend on the data's path: its first trajectory, else its first name."""
    named: dict[int, list[str]] = {}
    for group, name, keys in zip(groups.tolist(), episodes.names, episodes.keys, strict=True):
        trajectories = [f"\0{key}" for key in keys if key.startswith(f"{TRAJECTORY} ")]
        named.setdefault(group, []).append(min(trajectories, default=name))
    labels: dict[int, str] = {}
    taken: dict[str, int] = {}
    for group, names in named.items():
        label = min(names).lstrip("\0")
        taken[label] = taken.get(label, 0) + 1
        labels[group] = label if taken[label] == 1 else f"{label} ({taken[label]})"
    return labels


def _count_leaks(table: SampleTable, mask: NDArray[np.bool_]) -> tuple[int, int]:
    """How many frames the held-out samples show, and how many of them have the content of a frame trained on."""
    sides = []
    for side in (mask, ~mask):
        shown = [
            group_frames(store, table.rows[own], np.zeros(own.sum(), np.int64)).fingerprint
            for root, store in enumerate(table.stores)
            if (own := side & (table.root_index == root)).any()
        ]
        sides.append(np.concatenate([np.zeros(0, np.int64), *shown]))
    return len(sides[0]), int(np.isin(sides[0], sides[1]).sum())
