"""The trained model as a folder that from_pretrained loads."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from janus_cluster.config.schema import JobConfig
from janus_cluster.training.data.tokenizer import write_processing_files
from janus_cluster.training.model.load import write_vggt
from janus_cluster.training.model.lora import merge_adapters
from janus_cluster.training.subject import write_record
from janus_cluster.training.trainer import JanusTrainer
from janus_cluster.training.world import World


def write_export(folder: Path, *, trainer: JanusTrainer, tokenizer: Any, job: JobConfig, world: World) -> None:
    """`folder` holds weights, tokenizer, chat template and image processor, or what it held before.

    Every rank calls this: under ZeRO-3 the weights are gathered from all of them. Adapters are merged. VGGT is frozen,
    so its weights are added only where no file has them (the tiny preset's are random).
    """
    state_dict = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if world.is_main:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
        try:
            if job.training.lora.enabled:
                state_dict = merge_adapters(state_dict, job.training.lora)
            trainer.model.save_pretrained(temporary, state_dict=state_dict)
            if job.model.vggt_path is None:
                write_vggt(trainer.model, temporary)
            write_processing_files(temporary, tokenizer=tokenizer, data=job.data)
            write_record(temporary, job)
            _make_readable(temporary)
            _replace_folder(folder, temporary)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _make_readable(folder: Path) -> None:
    """Others may read the export: mkdtemp and safetensors make what they write private."""
    folder.chmod(0o755)
    for path in folder.iterdir():
        path.chmod(0o644)


def _replace_folder(folder: Path, new: Path) -> None:
    """`folder` is what `new` was; a folder cannot be renamed over a full one, so the old one steps aside first."""
    old = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.old."))
    if folder.exists():
        folder.rename(old / "was")
    new.rename(folder)
    # What another process still reads, NFS keeps as .nfsXXXX: no reason for a finished run to fail.
    shutil.rmtree(old, ignore_errors=True)
