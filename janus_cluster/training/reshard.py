"""Load a checkpoint of DeepSpeed's with another number of processes or under another ZeRO stage than wrote it.

DeepSpeed keeps the fp32 weights and Adam's two moments in flat tensors, cut among the ranks by a rule of each stage's
own, and loads them only where number, stage and cut are the same. Its universal checkpoints lift that, but not for us:
the loader of ZeRO-3 gives the first group's weight decay to all groups (DeepSpeed 0.19.8, stage3.py,
load_hp_checkpoint_state_from_checkpoint_dir_stage3), ZeRO-0 has none, and every change would write the state once more
to the disk: 100 GB for the 7B model.

Here each rank maps the written files into memory and copies what it needs of them, parameter by parameter, into its own
flat tensors. The values of every parameter and moment are unchanged.
"""

from __future__ import annotations

import itertools
import math
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from deepspeed.runtime.fp16 import loss_scaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from janus_cluster.errors import UsageError
from janus_cluster.modelspec.zero_cut import Cut, find_obstacle

MOMENTS = ("exp_avg", "exp_avg_sq")
WEIGHT = "weight"
# What of an optimizer group is no setting of the job, but moved on by the steps that were made.
_OF_THE_SCHEDULE = ("lr", "initial_lr")


def _member(kind: Any, name: str) -> ZeroStageEnum:
    """ZeRO's stage of that name. Raises: ValueError for anything else that a pickle would have looked up."""
    if kind is not ZeroStageEnum or name not in ZeroStageEnum.__members__:
        raise ValueError(f"it looks up {name!r} in {kind!r}")
    return ZeroStageEnum[name]


# Python 3.11.0 to 3.11.3 (Debian 12's is 3.11.2) write a member of an enumeration as `getattr(class, name)`.
_SAFE = [
    ZeroStageEnum, fragment_address, loss_scaler.LossScaler, loss_scaler.DynamicLossScaler,
    (_member, "builtins.getattr"),
]  # fmt: skip


class Piece(NamedTuple):
    """`numel` numbers of a parameter, from its number `start` on: in flat tensor `group` of `rank`, at `offset`."""

    rank: int
    group: int
    offset: int
    start: int
    numel: int


Layout = dict[str, list[Piece]]


class Shard:
    """What one rank holds of the optimizer's state, in the form of its engine's state_dict().

    The engine in memory and the files on the disk have the same form.
    """

    def __init__(self, state: dict[str, Any], *, stage: int, weights: Sequence[torch.Tensor] | None = None) -> None:
        """`weights`: those of ZeRO-0 in fp32, where they are the model's own, in the optimizer's order."""
        self.state = state
        self.torch_state: dict[str, Any]
        self.weights: list[torch.Tensor]
        if stage == 3:
            self.torch_state, self.weights = state["optimizer_state_dict"], state["fp32_flat_groups"]
        elif stage in (1, 2):
            self.torch_state, self.weights = state["base_optimizer_state"], state["single_partition_of_fp32_groups"]
        elif "fp32_groups" in state:
            self.torch_state = state["optimizer_state_dict"]
            self.weights = list(itertools.chain.from_iterable(state["fp32_groups"]))
        else:
            self.torch_state, self.weights = state, list(weights or ())

    def flat(self, key: str, group: int) -> torch.Tensor | None:
        """A flat tensor; None for a moment that does not exist because its weights never had a gradient."""
        if key == WEIGHT:
            return self.weights[group].detach().view(-1)
        moments = self.torch_state["state"].get(group)
        if moments is None:
            return None
        flat: torch.Tensor = moments[key].view(-1)
        return flat

    @property
    def step(self) -> float:
        """How many updates Adam has made; 0 before the first, or where this rank holds nothing."""
        return max((float(moments["step"]) for moments in self.torch_state["state"].values()), default=0.0)


@dataclass(frozen=True, kw_only=True)
class Source:
    """A checkpoint on the disk: mapped, not read."""

    folder: Path
    cut: Cut
    shards: Sequence[Shard]
    layout: Layout
    counters: Mapping[str, int]

    @property
    def step(self) -> float:
        return max(shard.step for shard in self.shards)

    def read(self, key: str, name: str, *, start: int, into: torch.Tensor) -> None:
        """`into` (1-D) holds the parameter's numbers from `start` on."""
        for piece in self.layout[name]:
            begin, end = max(start, piece.start), min(start + into.numel(), piece.start + piece.numel)
            if begin >= end:
                continue
            target = into[begin - start : end - start]
            flat = self.shards[piece.rank].flat(key, piece.group)
            if flat is None:
                target.zero_()
            else:
                target.copy_(flat[piece.offset + begin - piece.start : piece.offset + end - piece.start])


def written_cut(checkpoint: Path) -> Cut:
    """Who wrote `checkpoint`. Raises: UsageError if that cannot be read."""
    model_state = load_states(_model_states(checkpoint)[0])
    return Cut.of(model_state["ds_config"], world_size=int(model_state["dp_world_size"]))


def load_resharded(engine: Any, checkpoint: Path, *, groups: Sequence[Mapping[str, Any]]) -> None:
    """`engine` has weights, moments, learning rates and counters of `checkpoint`, of any ZeRO stage and ranks.

    groups: the optimizer's, as build.parameter_groups orders them; what ZeRO-0 writes holds no names.
    Every rank calls this before the first step. Raises: UsageError if anything is missing or has another size.
    """
    names = [[engine.param_names[p] for p in group["params"]] for group in groups]
    _require_no_obstacle(engine.config, checkpoint, written_cut(checkpoint))
    source = load_source(checkpoint, names=names)
    stage = int(engine.zero_optimization_stage())
    has_prologue = hasattr(engine.optimizer, "checkpoint_event_prologue")
    if has_prologue:
        engine.optimizer.checkpoint_event_prologue()
    parameters = {engine.param_names[p]: p for group in groups for p in group["params"]}
    state = engine.optimizer.state_dict()
    mine = Shard(state, stage=stage, weights=[p.data for p in parameters.values()])
    rank = dist.get_rank()
    layout = _engine_layout(engine, mine, stage=stage, names=names, parameters=parameters)
    require_same_parameters(source, {name: sum(p.numel for p in pieces) for name, pieces in layout.items()})

    _fill(mine, _pieces_by_group(layout, rank=rank), source)
    _take_schedule(mine, source)
    if stage in (1, 2, 3):
        engine.optimizer.load_state_dict([state] * dist.get_world_size(), load_from_fp32_weights=True)
    else:
        engine.optimizer.load_state_dict(state)
    _refresh_model(engine, stage=stage, source=source, parameters=parameters)
    if has_prologue:
        engine.optimizer.checkpoint_event_epilogue()
    for counter, value in source.counters.items():
        setattr(engine, counter, value)


def load_source(checkpoint: Path, *, names: Sequence[Sequence[str]]) -> Source:
    """The files of `checkpoint`, mapped into memory. Raises: UsageError if one is missing or is of another cut."""
    first, *_ = model_files = _model_states(checkpoint)
    model_state = load_states(first)
    cut = Cut.of(model_state["ds_config"], world_size=int(model_state["dp_world_size"]))
    _require_no_obstacle(model_state["ds_config"], checkpoint, cut)
    flat_names = [name for group in names for name in group]
    if cut.stage == 0:
        state, module = model_state["optimizer"], model_state["module"]
        missing = [name for name in flat_names if name not in module]
        shards = [Shard(state, stage=0, weights=[module[name] for name in flat_names if name in module])]
        num_held = sum(len(group["params"]) for group in shards[0].torch_state["param_groups"])
        if missing or num_held != len(flat_names):
            shown = f"; {', '.join(missing[:3])}: not there" if missing else ""
            raise _of_other_parameters(checkpoint, f"{num_held} tensors there, {len(flat_names)} here{shown}")
        layout = _layout_of_wholes(flat_names, shards[0])
    else:
        states = [load_states(path)["optimizer_state_dict"] for path in _optimizer_states(checkpoint, cut)]
        shards = [Shard(state, stage=cut.stage) for state in states]
        if cut.stage == 3:
            layout = _layout_of_shapes(model_state["param_shapes"], cut.world_size)
        else:
            layout = _layout_of_slices([state["param_slice_mappings"] for state in states])
    _require_whole(layout, shards, folder=model_files[0].parent, cut=cut)
    counters = {name: int(model_state[name]) for name in ("global_steps", "global_samples", "skipped_steps")}
    return Source(folder=checkpoint, cut=cut, shards=shards, layout=layout, counters=counters)


def how_to_go_on(cut: Cut) -> str:
    """What to type to go on from a checkpoint that only its writers can read."""
    return (
        f"go on with {cut.world_size} processes (--nodes × hardware.processes_per_node) and --set deepspeed.profile="
        f"zero{cut.stage}, as it was written; or submit a new run, which begins at step 0"
    )


def _require_no_obstacle(ds_config: Mapping[str, Any], checkpoint: Path, cut: Cut) -> None:
    if (obstacle := find_obstacle(ds_config)) is not None:
        raise UsageError(
            f"{checkpoint} was written by {cut}; with {obstacle} it can only be resumed with those",
            hint=how_to_go_on(cut),
        )


def load_states(path: Path) -> dict[str, Any]:
    """A file of DeepSpeed's; its tensors stay on the disk until they are copied. Nothing in it is executed."""
    try:
        with torch.serialization.safe_globals(_SAFE):
            value = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as e:
        raise UsageError(f"{path} cannot be read: {str(e).splitlines()[0]}") from e
    assert isinstance(value, dict), path
    return value


def _model_states(checkpoint: Path) -> list[Path]:
    """One file, or under ZeRO-3 one a rank."""
    try:
        tag = (checkpoint / "latest").read_text(encoding="utf-8").strip()
    except OSError as e:
        raise UsageError(f"{checkpoint} holds no checkpoint of DeepSpeed's: {e.strerror}") from e
    found = sorted((checkpoint / tag).glob("*mp_rank_00_model_states.pt"))
    if not found:
        raise UsageError(f"{checkpoint / tag} holds no *mp_rank_00_model_states.pt")
    return found


def _optimizer_states(checkpoint: Path, cut: Cut) -> list[Path]:
    """One file a rank that wrote, by rank."""
    folder = _model_states(checkpoint)[0].parent
    paths = []
    for rank in range(cut.world_size):
        found = list(folder.glob(f"*zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"))
        if len(found) != 1:
            raise UsageError(f"{folder} was written by {cut}, but holds {len(found)} files of rank {rank}'s optimizer")
        paths += found
    return paths


def _layout_of_wholes(names: Sequence[str], shard: Shard) -> Layout:
    """ZeRO-0: every tensor is a flat tensor of its own, the same on all ranks."""
    return {
        name: [Piece(0, index, 0, 0, weight.numel())]
        for index, (name, weight) in enumerate(zip(names, shard.weights, strict=True))
    }


def _layout_of_slices(mappings: Sequence[Sequence[Mapping[str, Any]]]) -> Layout:
    """ZeRO-1 and 2: a group's parameters one after another, cut in ranks wherever that falls.

    mappings: by rank, by group, by name: the place of a parameter's part in the rank's flat tensor.
    """
    layout: Layout = {}
    for rank, by_group in enumerate(mappings):
        for group, by_name in enumerate(by_group):
            for name, at in by_name.items():
                pieces = layout.setdefault(name, [])
                begin = pieces[-1].start + pieces[-1].numel if pieces else 0
                pieces.append(Piece(rank, group, int(at.start), begin, int(at.numel)))
    return layout


def _layout_of_shapes(shapes: Sequence[Mapping[str, torch.Size]], world_size: int) -> Layout:
    """ZeRO-3: every parameter is cut in as many equal parts as there are ranks, the last one padded.

    shapes: by flat tensor, by name, in their order.
    """
    layout: Layout = {}
    for group, by_name in enumerate(shapes):
        offset = 0
        for name, shape in by_name.items():
            numel = math.prod(shape)
            part = math.ceil(numel / world_size)
            starts = range(0, numel, part) if part else ()
            layout[name] = [
                Piece(rank, group, offset, start, min(part, numel - start)) for rank, start in enumerate(starts)
            ]
            offset += part
    return layout


def _engine_layout(
    engine: Any,
    mine: Shard,
    *,
    stage: int,
    names: Sequence[Sequence[str]],
    parameters: Mapping[str, torch.Tensor],
) -> Layout:
    """The same of the engine in memory, over all ranks."""
    world_size = dist.get_world_size()
    if stage == 0:
        rank = dist.get_rank()
        wholes = _layout_of_wholes([name for group in names for name in group], mine)
        return {name: [piece._replace(rank=rank) for piece in pieces] for name, pieces in wholes.items()}
    if stage == 3:
        of_parameter = {id(parameter): name for name, parameter in parameters.items()}
        shapes = [{of_parameter[id(p)]: p.ds_shape for p in group} for group in engine.optimizer.fp16_groups]
        return _layout_of_shapes(shapes, world_size)
    mappings: list[Any] = [None] * world_size
    dist.all_gather_object(mappings, mine.state["param_slice_mappings"])
    return _layout_of_slices(mappings)


def _pieces_by_group(layout: Layout, *, rank: int) -> dict[int, list[tuple[str, Piece]]]:
    found: dict[int, list[tuple[str, Piece]]] = {}
    for name, pieces in layout.items():
        for piece in pieces:
            if piece.rank == rank:
                found.setdefault(piece.group, []).append((name, piece))
    return found


def _fill(mine: Shard, pieces: Mapping[int, Sequence[tuple[str, Piece]]], source: Source) -> None:
    """The engine's flat tensors hold the checkpoint's values; padding holds 0."""
    moments: dict[int, dict[str, torch.Tensor]] = {}
    # The moments are as long as their flat weights with the padding, which ZeRO-1 and 2 leave out of state_dict().
    paddings = mine.state.get("group_paddings", [0] * len(mine.weights))
    for group, (weight, padding) in enumerate(zip(mine.weights, paddings, strict=True)):
        # ZeRO-3 has made them already: those are used, there may be no room for a second pair.
        held = mine.torch_state["state"].get(group, {})
        fresh = {key: held[key] if key in held else _zeros_like(weight, padding=padding) for key in MOMENTS}
        moments[group] = {"step": torch.tensor(source.step)} | fresh
    mine.torch_state["state"] = moments
    for group, of_group in pieces.items():
        for key in (WEIGHT, *MOMENTS):
            flat = mine.flat(key, group)
            assert flat is not None
            for name, piece in of_group:
                source.read(key, name, start=piece.start, into=flat[piece.offset : piece.offset + piece.numel])


def _zeros_like(weight: torch.Tensor, *, padding: int) -> torch.Tensor:
    return weight.new_zeros(weight.numel() + padding) if padding else torch.zeros_like(weight, requires_grad=False)


def _take_schedule(mine: Shard, source: Source) -> None:
    """Every group has the learning rate of the last step; a group's other values are the job's."""
    written = {group["name"]: group for group in source.shards[0].torch_state["param_groups"]}
    for group in mine.torch_state["param_groups"]:
        group.update({key: written[group["name"]][key] for key in _OF_THE_SCHEDULE if key in written[group["name"]]})


def _refresh_model(engine: Any, *, stage: int, source: Source, parameters: Mapping[str, torch.Tensor]) -> None:
    """The weights that the model computes with are those of the optimizer, rounded to their type."""
    if stage in (1, 2):
        engine.optimizer.update_lp_params()
    elif stage == 0:
        for name, parameter in parameters.items():
            source.read(WEIGHT, name, start=0, into=parameter.data.view(-1))


def _require_whole(layout: Layout, shards: Sequence[Shard], *, folder: Path, cut: Cut) -> None:
    """Raises: UsageError unless the flat tensors have the layout's length."""
    ends: dict[tuple[int, int], int] = {}
    for pieces in layout.values():
        for piece in pieces:
            at = (piece.rank, piece.group)
            ends[at] = max(ends.get(at, 0), piece.offset + piece.numel)
    for (rank, group), end in ends.items():
        held = shards[rank].weights[group].numel()
        if held < end:
            raise UsageError(
                f"{folder}: flat tensor {group} of rank {rank} holds {held} numbers, its parameters need {end}",
                hint=how_to_go_on(cut),
            )


def require_same_parameters(source: Source, wanted: Mapping[str, int]) -> None:
    """Raises: UsageError unless the checkpoint holds exactly the parameters that learn, with their sizes."""
    held = {name: sum(piece.numel for piece in pieces) for name, pieces in source.layout.items()}
    different = sorted(name for name in held.keys() | wanted.keys() if held.get(name) != wanted.get(name))
    if different:
        shown = "; ".join(
            f"{name}: {f'{held[name]} there' if name in held else 'not there'}, "
            f"{f'{wanted[name]} here' if name in wanted else 'not trained here'}"
            for name in different[:3]
        )
        raise _of_other_parameters(source.folder, f"{len(different)} differ: {shown}")


def _of_other_parameters(folder: Path, what: str) -> UsageError:
    return UsageError(
        f"{folder} holds other parameters than this job trains ({what})",
        hint="training.tune, training.lora and model.* must be those of the run that wrote it",
    )
