"""What is evaluated: a trained model, and the episodes it is shown, prepared as they were for training."""

from __future__ import annotations

import os
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError
from yaml import YAMLError

from janus_cluster.errors import UsageError
from janus_cluster.janusvln.data.index import load_samples
from janus_cluster.janusvln.data.indexing import Reporter
from janus_cluster.janusvln.data.samples import Sample
from janus_cluster.janusvln.data.split import EarlierSplit, HeldOut, load_earlier_split, warn_of_leak
from janus_cluster.job.home import index_cache
from janus_cluster.job.load import typed
from janus_cluster.job.schema import Data, JobConfig, Root
from janus_cluster.job.yamlfile import parse_value
from janus_cluster.modelspec.check_weights import find_new_modules, read_model_index
from janus_cluster.modelspec.vggt_source import find_vggt
from janus_cluster.run.current import current_bundle, has_bundles
from janus_cluster.run.next_command import command_for
from janus_cluster.run.paths import RunDir
from janus_cluster.run.records.bundle import load_resolved
from janus_cluster.run.records.training import PreparationRecord

# Beside the weights, since nothing else in an exported folder records how frames were resized or the history's length.
PREPARATION_NAME = "janus_data.json"
_PREPARATION_KEYS = {
    "history", "image_mode", "image_width", "max_pixels", "min_pixels", "max_length", "on_too_long",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Shown:
    """The samples that a model is shown. `held_out` is the split that chose them; None for data that was named."""

    samples: Sequence[Sample]
    held_out: HeldOut | None


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model folder and its data. `vggt_path` is where VGGT's weights are: the folder itself, or another place.

    has_action_head: False where the folder holds none, so that a loaded model has a random one.
    `index_dir` is where the run keeps its index of the data: what training has read need not be read again.
    """

    model: Path
    vggt_path: Path
    has_action_head: bool
    data: Data
    pad_history: bool
    held_out_only: bool
    seed: int
    index_dir: Path | None = None
    earlier: EarlierSplit | None = None

    def load_samples(self) -> Shown:
        """The held-out samples of a run's own data, or every sample of data that was named.

        Raises: UsageError if there are none.
        """
        try:
            split = load_samples(
                self.data,
                seed=self.seed,
                pad_history=self.pad_history,
                index_dir=_choose_index_dir(self.index_dir),
                reporter=Reporter(report=_print),
                earlier=self.earlier,
            )
        except UsageError as error:
            raise error if self.held_out_only else _in_terms_of_eval(error) from error
        for line in split.absent:
            _print(line)
        if self.held_out_only:
            _print(split.split.describe())
            if (warning := warn_of_leak(split.split, RunDir(self.model.parent))) is not None:
                _print(f"warning: {warning}")
        samples = split.held_out if self.held_out_only else split.train
        if not len(samples):
            raise UsageError(
                f"nothing is held out: data.validation_fraction is {self.data.validation_fraction:g}",
                hint="name episodes that were not trained on: --data ROOT",
            )
        return Shown(samples=samples, held_out=split.split if self.held_out_only else None)


def write_preparation(folder: Path, job: JobConfig) -> None:
    """Record in `folder` how the model's data was prepared, so that it is never evaluated on other data."""
    data = job.data.model_dump(mode="json", include=_PREPARATION_KEYS)
    record = PreparationRecord(compat=job.compat, vggt_path=job.model.vggt_path, data=data)
    record.write(folder / PREPARATION_NAME)


def load_subject(
    target: Path, *, roots: Sequence[str] = (), vggt_path: str | None = None, needs_data: bool = True
) -> Subject:
    """The model of a run folder with its held-out episodes, or an exported folder with the episodes under `roots`.

    A root is a path, or `{path: …, images: …}` as data.roots has it. needs_data: an exported folder without roots is
    refused, since there is nothing to show it.

    Raises: UsageError naming what is missing.
    """
    run = RunDir(target)
    if has_bundles(run):
        job = load_resolved(current_bundle(run)).job
        if not (run.export / "config.json").is_file():
            raise UsageError(
                f"{run.path} has no export: training has not finished, or checkpoint.export was false",
                hint=command_for("status", run),
            )
        return Subject(
            model=run.export,
            vggt_path=choose_vggt(run.export, vggt_path, job.model.vggt_path),
            has_action_head=_has_action_head(run.export),
            data=_with_roots(job.data, roots),
            pad_history=job.compat == "predecessor",
            held_out_only=not roots,
            seed=job.training.seed,
            index_dir=Path(job.data.index_dir) if job.data.index_dir else run.data_index,
            earlier=load_earlier_split(run),
        )
    if not (target / "config.json").is_file():
        raise UsageError(
            f"{target} is neither a run folder nor an exported model (no config.json in it)",
            hint="janus-cluster list shows the runs",
        )
    if not roots and needs_data:
        raise UsageError(
            f"{target} is an exported model: which episodes are to be shown to it?",
            hint=f"janus-cluster eval {target} --data ROOT; a run's own held-out episodes: janus-cluster eval RUN",
        )
    preparation = load_preparation(target)
    return Subject(
        model=target,
        vggt_path=choose_vggt(target, vggt_path, preparation.vggt_path),
        has_action_head=_has_action_head(target),
        data=_with_roots(Data.model_validate(preparation.data), roots),
        pad_history=preparation.compat == "predecessor",
        held_out_only=False,
        seed=0,
    )


def draw_indices(count: int, wanted: int) -> list[int]:
    """`wanted` of range(count), ascending, the same ones every time; all of them where there are not more.

    Drawn, not evenly spaced: a stride that fits the length of the episodes would meet the same step of each.
    """
    return sorted(random.Random(0).sample(range(count), min(count, wanted)))


def _in_terms_of_eval(error: UsageError) -> UsageError:
    """The same error with --data in place of the job's data.roots."""
    message = re.sub(r"^data\.roots\b", "--data", error.message)
    hint = re.sub(r"--set 'data\.roots=\[(.*?)\]'", r"--data '\1'", error.hint or "")
    hint = hint.replace("{path: …, images: …} in data.roots", "--data '{path: …, images: …}'")
    return UsageError(message, hint=hint.replace("data.roots", "--data") or None)


def _print(line: str) -> None:
    print(line, flush=True)


def _choose_index_dir(of_the_run: Path | None) -> Path | None:
    """The run's folder of indexes, or this user's own where there is none or it is another user's; None where neither
    can be written: then the data is read and nothing is kept.
    """
    for folder in (of_the_run, index_cache()):
        if folder is None:
            continue
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(folder, os.W_OK | os.X_OK):
            return folder
    return None


def _with_roots(data: Data, roots: Sequence[str]) -> Data:
    """`data` of other roots, nothing of them held out; the same data where no root is given.

    Of named data, all that was rendered is evaluated; how much was not is printed.
    """
    if not roots:
        return data
    try:
        values = [typed(parse_value(root), Root) if root.lstrip().startswith("{") else root for root in roots]
        return Data.model_validate(
            data.model_dump() | {"roots": values, "validation_fraction": 0.0, "max_absent_fraction": 1.0}
        )
    except (YAMLError, ValidationError, UsageError) as error:
        found = error.errors() if isinstance(error, ValidationError) else []
        what = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in found) or str(error)
        raise UsageError(f"--data {' '.join(roots)}: {what}", hint="--data '{path: FILE, images: FOLDER}'") from error


def choose_vggt(folder: Path, given: str | None, recorded: str | None) -> Path:
    """The path of VGGT's weights: the user's, else the folder's own, else the one that training used."""
    hint = "--vggt-path /path/to/VGGT-1B"
    if given is not None:
        return find_vggt(Path(given), key="--vggt-path").path
    try:
        return find_vggt(folder, key="model").path
    except UsageError as inside:
        if recorded is None:
            raise UsageError(f"{inside.message}; and no other path of them is known", hint=hint) from inside
    try:
        return find_vggt(Path(recorded), key="the VGGT weights that the model was trained with").path
    except UsageError as error:
        raise UsageError(error.message, hint=hint) from error


def _has_action_head(folder: Path) -> bool:
    """Raises: UsageError where the folder lacks what every answer depends on, and loading would draw it at random."""
    new = find_new_modules(read_model_index(folder))
    if "merger." in new:
        raise UsageError(
            f"{folder} holds no merger.*: it was not trained with a spatial memory, and a random one would answer",
            hint="evaluate an export, or a published JanusVLN checkpoint",
        )
    return "action_head." not in new


def load_preparation(folder: Path) -> PreparationRecord:
    """How the folder's data was prepared; a job file's defaults, with a note about it, where it is not recorded."""
    path = folder / PREPARATION_NAME
    if not path.is_file():
        _print(f"{path} is not there: history and image size are a job file's defaults")
        return PreparationRecord(compat="none", vggt_path=None, data={})
    try:
        preparation = PreparationRecord.read(path)
        Data.model_validate(preparation.data)
        return preparation
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{path} cannot be used: {error}", hint="remove it to evaluate with a job file's defaults"
        ) from error
