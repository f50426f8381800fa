"""A random tiny model with its samples, and the folder that it is exported to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from training_run import resolve

from janus_cluster.janusvln.data.dataset import NavigationDataset
from janus_cluster.janusvln.data.index import load_samples
from janus_cluster.janusvln.data.samples import Sample
from janus_cluster.janusvln.data.tokenizer import tokenizer_ids, write_processing_files
from janus_cluster.janusvln.model.build import build_model
from janus_cluster.janusvln.model.janus import JanusModel
from janus_cluster.janusvln.model.load import write_vggt
from janus_cluster.janusvln.world.demo import write_demo_episodes
from janus_cluster.job.schema import JobConfig
from janus_cluster.training.entry import load_job_tokenizer
from janus_cluster.training.subject import write_preparation

SEED, IMAGE_SIZE = 3, (160, 120)


@dataclass(frozen=True)
class Tiny:
    """A random model, its tokenizer, its job and some samples."""

    job: JobConfig
    model: JanusModel
    tokenizer: Any
    samples: tuple[Sample, ...]
    episodes: Path

    def dataset(self, samples: tuple[Sample, ...]) -> NavigationDataset:
        return NavigationDataset(
            samples, tokenizer=self.tokenizer, data=self.job.data, segment_weights=self.job.training.segment_weights
        )

    def export(self, folder: Path) -> Path:
        """The folder that training would leave. Returns: it."""
        self.model.save_pretrained(folder)
        write_vggt(self.model, folder)
        write_processing_files(folder, tokenizer=self.tokenizer, data=self.job.data)
        write_preparation(folder, self.job)
        return folder


def make_tiny(folder: Path) -> Tiny:
    """Two demo episodes and a model for them; the same one each time.

    Loss weights are unequal and one is 0: none of that may be seen in a perplexity.
    """
    episodes = folder / "demo"
    write_demo_episodes(episodes, num_episodes=2, seed=SEED, image_size=IMAGE_SIZE)
    data = {"roots": [str(episodes)], "history": 2, "image_width": 84, "min_pixels": 784, "num_workers": 0}
    settings = {
        "nodes": 1,
        "model": {"preset": "tiny"},
        "data": data | {"validation_fraction": 0},
        "training": {"precision": "fp32", "segment_weights": {"subinstruction": 0, "action": 3}},
    }
    job = resolve(settings, run_dir=folder / "run").job
    split = load_samples(job.data, seed=0)
    tokenizer = load_job_tokenizer(job, split)
    model = build_model(
        job.model, job.training, tokenizer_ids=tokenizer_ids(tokenizer), device="cpu", dtype=torch.float32, seed=0
    )
    return Tiny(job, model.eval(), tokenizer, tuple(split.train), episodes)
