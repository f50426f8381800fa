"""What is evaluated: a trained model, and the episodes it is shown, prepared as they were for training."""

from __future__ import annotations

import os
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from yaml import YAMLError

from janus_cluster.config.check_weights import find_new_modules, read_model_index
from janus_cluster.config.home import index_cache
from janus_cluster.config.schema import Data, JobConfig, ResolvedJob
from janus_cluster.config.vggt_source import find_vggt
from janus_cluster.config.yamlfile import parse_value
from janus_cluster.errors import UsageError
from janus_cluster.rundir import RunDir, read_json, write_json_atomically
from janus_cluster.training.data.index import load_samples
from janus_cluster.training.data.indexing import Told
from janus_cluster.training.data.samples import Sample
from janus_cluster.training.data.split import EarlierSplit, HeldOut, load_earlier_split, warn_of_leak

# Beside the weights, since nothing else in an exported folder says how frames were resized or how long the history is.
RECORD_NAME = "janus_data.json"
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
                told=Told(report=_say),
                earlier=self.earlier,
            )
        except UsageError as error:
            raise error if self.held_out_only else _in_terms_of_eval(error) from error
        for line in split.absent:
            _say(line)
        if self.held_out_only:
            _say(split.split.describe())
            if (warning := warn_of_leak(split.split, RunDir(self.model.parent))) is not None:
                _say(f"warning: {warning}")
        samples = split.held_out if self.held_out_only else split.train
        if not len(samples):
            raise UsageError(
                f"nothing is held out: data.validation_fraction is {self.data.validation_fraction:g}",
                hint="name episodes that were not trained on: --data ROOT",
            )
        return Shown(samples=samples, held_out=split.split if self.held_out_only else None)


def write_record(folder: Path, job: JobConfig) -> None:
    """`folder` says how the model's data was prepared, so that it is never evaluated on data prepared otherwise."""
    record = {
        "schema_version": 1,
        "compat": job.compat,
        "vggt_path": job.model.vggt_path,
        "data": job.data.model_dump(mode="json", include=_PREPARATION_KEYS),
    }
    write_json_atomically(folder / RECORD_NAME, record)


def load_subject(target: Path, *, roots: Sequence[str] = (), vggt_path: str | None = None) -> Subject:
    """The model of a run folder with its held-out episodes, or an exported folder with the episodes under `roots`.

    A root is a path, or `{path: …, images: …}` as data.roots has it.

    Raises: UsageError naming what is missing.
    """
    run = RunDir(target)
    if run.resolved_json.is_file():
        job = ResolvedJob.load(run.resolved_json.read_text(encoding="utf-8")).job
        if not (run.export / "config.json").is_file():
            raise UsageError(
                f"{run.path} has no export: training has not finished, or checkpoint.export was false",
                hint=f"janus-cluster status {run.name}",
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
    if not roots:
        raise UsageError(
            f"{target} is an exported model: which episodes are to be shown to it?",
            hint=f"janus-cluster eval {target} --data ROOT; a run's own held-out episodes: janus-cluster eval RUN",
        )
    record = load_record(target)
    return Subject(
        model=target,
        vggt_path=choose_vggt(target, vggt_path, record["vggt_path"]),
        has_action_head=_has_action_head(target),
        data=_with_roots(Data.model_validate(record["data"]), roots),
        pad_history=record["compat"] == "predecessor",
        held_out_only=False,
        seed=0,
    )


def draw_indices(count: int, wanted: int) -> list[int]:
    """`wanted` of range(count), ascending, the same ones every time; all of them where there are not more.

    Drawn, not evenly spaced: a stride that fits the length of the episodes would meet the same step of each.
    """
    return sorted(random.Random(0).sample(range(count), min(count, wanted)))


def _in_terms_of_eval(error: UsageError) -> UsageError:
    """The same error with --data, where it speaks of the job's data.roots."""
    message = re.sub(r"^data\.roots\b", "--data", error.message)
    hint = re.sub(r"--set 'data\.roots=\[(.*?)\]'", r"--data '\1'", error.hint or "")
    hint = hint.replace("{path: …, images: …} in data.roots", "--data '{path: …, images: …}'")
    return UsageError(message, hint=hint.replace("data.roots", "--data") or None)


def _say(line: str) -> None:
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
        values = [parse_value(root) if root.lstrip().startswith("{") else root for root in roots]
        return Data.model_validate(
            data.model_dump() | {"roots": values, "validation_fraction": 0.0, "max_absent_fraction": 1.0}
        )
    except (YAMLError, ValidationError, UsageError) as error:
        found = error.errors() if isinstance(error, ValidationError) else []
        what = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in found) or str(error)
        raise UsageError(f"--data {' '.join(roots)}: {what}", hint="--data '{path: FILE, images: FOLDER}'") from error


def choose_vggt(folder: Path, given: str | None, recorded: str | None) -> Path:
    """Where VGGT's weights lie: what the user says, else the folder's own, else where training took them from."""
    hint = "--vggt-path /path/to/VGGT-1B"
    if given is not None:
        return find_vggt(Path(given), key="--vggt-path").path
    try:
        return find_vggt(folder, key="model").path
    except UsageError as inside:
        if recorded is None:
            raise UsageError(f"{inside.message}; and nothing says where they are", hint=hint) from inside
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


def load_record(folder: Path) -> dict[str, Any]:
    """The folder's own record, or the defaults of a job file with a word about it."""
    path = folder / RECORD_NAME
    if not path.is_file():
        _say(f"{path} is not there: history and image size are a job file's defaults")
        return {"compat": "none", "vggt_path": None, "data": {}}
    try:
        record = read_json(path)
        if record["schema_version"] != 1:
            raise ValueError(f"schema_version is {record['schema_version']}, known is 1")
        Data.model_validate(record["data"])
        return {key: record[key] for key in ("compat", "vggt_path", "data")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{path} cannot be used: {error}", hint="remove it to evaluate with a job file's defaults"
        ) from error
