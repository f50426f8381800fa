"""The step's gradient does not depend on how the batch is cut; only tuned parts are in the optimizer."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from run_files import read_metric_lines
from training_run import resolve

from janus_cluster.errors import TrainingFailed
from janus_cluster.janusvln.data.dataset import NavigationDataset, collate
from janus_cluster.janusvln.data.index import load_samples
from janus_cluster.janusvln.data.lengths import load_token_counts
from janus_cluster.janusvln.data.tokenizer import tokenizer_ids
from janus_cluster.janusvln.model.build import build_model
from janus_cluster.janusvln.world.demo import write_demo_episodes
from janus_cluster.run.checkpoints import find_newest_complete
from janus_cluster.run.paths import RunDir
from janus_cluster.training.batches import build_batches
from janus_cluster.training.entry import load_job_tokenizer
from janus_cluster.training.metrics import MetricsLog
from janus_cluster.training.trainer import JanusTrainer, build_training_arguments
from janus_cluster.training.world import World

pytestmark = pytest.mark.train

ALONE = World(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def episodes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data") / "demo"
    write_demo_episodes(root, num_episodes=4, seed=1, image_size=(160, 120))
    return root


def build_trainer(
    episodes: Path,
    folder: Path,
    *,
    data: dict[str, Any] | None = None,
    dataset: type[NavigationDataset] = NavigationDataset,
    every_steps: int = 500,
    **training: Any,
) -> JanusTrainer:
    """One process, no DeepSpeed: four samples of unequal length make one optimizer step."""
    settings = {
        "max_steps": 1,
        "learning_rate": 1e-3,
        "precision": "fp32",
        "lr_scheduler": "constant",
        "warmup_ratio": 0,
    }
    resolved = resolve(
        {
            "nodes": 1,
            "model": {"preset": "tiny"},
            "data": {
                "roots": [str(episodes)],
                "history": 2,
                "image_width": 84,
                "min_pixels": 784,
                "num_workers": 0,
            }
            | (data or {}),
            "training": settings | training,
            "checkpoint": {"every_steps": every_steps},
        },
        run_dir=folder,
    )
    job = resolved.job
    split = load_samples(job.data, seed=0)
    tokenizer = load_job_tokenizer(job, split)
    arguments = build_training_arguments(job, output_dir=folder / "checkpoints", ds_config_json=None, device="cpu")
    model = build_model(
        job.model, job.training, tokenizer_ids=tokenizer_ids(tokenizer), device="cpu", dtype=torch.float32, seed=0
    )
    samples = split.train[:4]
    return JanusTrainer(
        model=model,
        args=arguments,
        job=job,
        world=ALONE,
        metrics=MetricsLog(RunDir(folder), attempt=1, is_main=True, effective_batch_size=resolved.effective_batch_size),
        train_dataset=dataset(
            samples, tokenizer=tokenizer, data=job.data, segment_weights=job.training.segment_weights
        ),
        batches=build_batches(job, samples, tokenizer, ALONE),
        data_collator=partial(collate, pad_token_id=tokenizer.pad_token_id),
    )


def gradients_of_one_step(trainer: JanusTrainer) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Gradients and summed loss of one optimizer step over all four samples, taken before any update."""
    batches, num_items = trainer.get_batch_samples(
        iter(trainer.get_train_dataloader()), trainer.args.gradient_accumulation_steps, trainer.args.device
    )
    trainer.current_gradient_accumulation_steps = len(batches)
    loss = sum(trainer.training_step(trainer.model, batch, num_items) for batch in batches)
    return {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}, loss


@pytest.mark.parametrize("accumulation", [2, 4])
def test_accumulated_gradients_are_those_of_one_batch(episodes: Path, tmp_path: Path, accumulation: int) -> None:
    whole = build_trainer(episodes, tmp_path / "a", per_device_batch_size=4, gradient_accumulation_steps=1)
    cut = build_trainer(
        episodes, tmp_path / "b", per_device_batch_size=4 // accumulation, gradient_accumulation_steps=accumulation
    )
    expected, expected_loss = gradients_of_one_step(whole)
    found, found_loss = gradients_of_one_step(cut)
    torch.testing.assert_close(found_loss, expected_loss)
    assert found.keys() == expected.keys() and len(found) > 40
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_frozen_parts_are_in_no_optimizer_group(episodes: Path, tmp_path: Path) -> None:
    trainer = build_trainer(episodes, tmp_path / "run", projector_learning_rate=3e-4, tune={"llm": False})
    optimizer = trainer.create_optimizer()
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    tuned = {names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert tuned == {
        name: 1e-3 if name.startswith("action_head.") else 3e-4
        for name in names.values()
        if name.startswith(("model.visual.merger.", "merger.", "action_head."))
    }


def test_floats_keep_their_dtype_on_the_way_to_the_device(episodes: Path, tmp_path: Path) -> None:
    trainer = build_trainer(episodes, tmp_path / "run")
    batch = {"loss_weights": torch.ones(1, 2), "frames": [torch.zeros(1, 3, 2, 2, dtype=torch.uint8)]}
    prepared = trainer._prepare_inputs(batch)
    assert prepared["loss_weights"].dtype == torch.float32
    assert isinstance(prepared["frames"], list) and prepared["frames"][0].dtype == torch.uint8


def test_no_rank_waits_for_others_before_its_own_batches_are_there(episodes: Path, tmp_path: Path) -> None:
    # The Trainer adds up the labels of all ranks' batches while these are fetched, unless that is switched off.
    assert not build_trainer(episodes, tmp_path / "run").args.average_tokens_across_devices


def test_a_run_that_had_done_all_its_steps_does_no_other(episodes: Path, tmp_path: Path) -> None:
    first = build_trainer(episodes, tmp_path / "run", per_device_batch_size=2, gradient_accumulation_steps=1)
    first.train()
    again = build_trainer(episodes, tmp_path / "run", per_device_batch_size=2, gradient_accumulation_steps=1)
    again.train(resume_from_checkpoint=str(find_newest_complete(tmp_path / "run" / "checkpoints")))
    assert (first.state.global_step, again.state.global_step) == (1, 1)
    assert sum(m["kind"] == "train" for m in read_metric_lines(RunDir(tmp_path / "run"))) == 1


def test_the_time_of_a_step_holds_all_of_the_steps_and_nothing_of_a_checkpoint(episodes: Path, tmp_path: Path) -> None:
    batch = {"per_device_batch_size": 1, "gradient_accumulation_steps": 1}
    build_trainer(episodes, tmp_path, max_steps=8, logging_steps=4, every_steps=3, **batch).train()
    events = list(read_metric_lines(RunDir(tmp_path)))
    fourth, last = (m for m in events if m["kind"] == "train")
    saving_s = sum(m["duration_s"] for m in events if m["kind"] == "checkpoint" and m["step"] == 6)
    assert saving_s > 0
    assert 4 * last["step_time_s"] == pytest.approx(last["time"] - fourth["time"] - saving_s, abs=0.01)


class RecordingDataset(NavigationDataset):
    """Knows which samples were asked for."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        self.asked = [*getattr(self, "asked", []), index]
        return super().__getitem__(index)


def test_a_resumed_epoch_reads_only_what_the_uninterrupted_one_had_left(episodes: Path, tmp_path: Path) -> None:
    def train(folder: str, *, max_steps: int, checkpoint: Path | None = None) -> tuple[list[int], list[float]]:
        trainer = build_trainer(
            episodes,
            tmp_path / folder,
            dataset=RecordingDataset,
            per_device_batch_size=1,
            gradient_accumulation_steps=1,
            max_steps=max_steps,
        )
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        return trainer.train_dataset.asked, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    whole, losses = train("whole", max_steps=8)
    first, _ = train("cut", max_steps=1)
    rest, losses_of_both = train("cut", max_steps=8, checkpoint=find_newest_complete(tmp_path / "cut" / "checkpoints"))
    assert sorted(whole[:4]) == sorted(whole[4:]) == [0, 1, 2, 3], "four steps are an epoch"
    assert whole[:4] != whole[4:], "each epoch has its own order"
    assert first + rest == whole
    assert losses_of_both == pytest.approx(losses, rel=1e-5)


def test_what_a_checkpoint_repeats_of_the_log_does_not_grow_with_the_run(episodes: Path, tmp_path: Path) -> None:
    trainer = build_trainer(episodes, tmp_path, max_steps=1)
    for step in range(500):
        trainer.log({"step_of_test": float(step)})
    assert 1 <= len(trainer.state.log_history) <= 100
    assert trainer.state.log_history[-1]["step_of_test"] == 499


def test_a_run_that_has_become_longer_follows_the_longer_schedule_at_once(episodes: Path, tmp_path: Path) -> None:
    def rates(trainer: JanusTrainer) -> list[float]:
        return [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]

    whole = build_trainer(episodes, tmp_path / "whole", max_steps=5, lr_scheduler="cosine")
    whole.train()
    build_trainer(episodes, tmp_path / "cut", max_steps=2, lr_scheduler="cosine").train()
    checkpoint = str(find_newest_complete(tmp_path / "cut" / "checkpoints"))
    longer = build_trainer(episodes, tmp_path / "cut", max_steps=5, lr_scheduler="cosine")
    longer._prepare_for_training(5, longer.get_train_dataloader(), checkpoint)
    used = [group["lr"] for group in longer.optimizer.param_groups if group["name"] == "llm"]
    assert used == [rates(whole)[2]], "not the short schedule's last rate, 0"
    longer.train(resume_from_checkpoint=checkpoint)
    assert rates(longer)[2:] == rates(whole)[2:]


def test_a_first_loss_that_is_no_number_is_not_blamed_on_the_learning_rate(episodes: Path, tmp_path: Path) -> None:
    trainer = build_trainer(episodes, tmp_path / "a", max_steps=2)
    with torch.no_grad():
        trainer.model.lm_head.weight[0, 0] = float("nan")
    with pytest.raises(TrainingFailed, match="before any weight was changed") as at_once:
        trainer.train()
    assert "learning_rate" not in str(at_once.value.hint)


def test_a_loss_is_blamed_on_the_learning_rate_once_that_was_above_0(episodes: Path, tmp_path: Path) -> None:
    trainer = build_trainer(episodes, tmp_path, max_steps=4, lr_scheduler="linear", warmup_ratio=0.5)
    trainer.create_optimizer_and_scheduler(4)
    trainer.state.global_step = 2
    assert not trainer._has_changed_weights(), "the first step of a warm-up has a learning rate of 0"
    trainer.state.global_step = 3
    assert trainer._has_changed_weights()
    trainer._began_at_step = 2
    assert not trainer._has_changed_weights(), "the first step after a resume"


def test_loader_processes_do_not_change_the_batches(episodes: Path, tmp_path: Path) -> None:
    def rows(num_workers: int) -> list[list[list[int]]]:
        trainer = build_trainer(episodes, tmp_path / "run", data={"num_workers": num_workers}, per_device_batch_size=1)
        return [batch["input_ids"].tolist() for batch in trainer.get_train_dataloader()]

    assert rows(2) == rows(0)


def test_a_root_of_three_times_the_weight_is_drawn_three_times_as_often(episodes: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    write_demo_episodes(other, num_episodes=1, seed=2, image_size=(160, 120))
    roots = [{"path": str(episodes), "weight": 3}, {"path": str(other), "weight": 1}]
    job = resolve({"model": {"preset": "tiny"}, "data": {"roots": roots}}, run_dir=tmp_path / "run").job
    samples = load_samples(job.data.model_copy(update={"validation_fraction": 0.0}), seed=0).train
    batches = build_batches(job, samples, load_job_tokenizer(job, load_samples(job.data, seed=0)), ALONE)
    drawn = []
    for epoch in range(20):
        batches.set_epoch(epoch)
        drawn += [samples[i].frames[-1].is_relative_to(other) for batch in batches for i in batch]
    share = np.mean([sample.frames[-1].is_relative_to(other) for sample in samples])
    expected = share / (share + 3 * (1 - share))
    assert share - expected > 3 / len(samples), "the weights make a difference"
    assert np.mean(drawn) == pytest.approx(expected, abs=1 / len(samples)), "to one draw an epoch"


@pytest.mark.parametrize("image_mode", ["crop", "pad"])
def test_token_counts_are_those_of_the_encoded_samples(episodes: Path, tmp_path: Path, image_mode: str) -> None:
    trainer = build_trainer(episodes, tmp_path / "run", data={"image_mode": image_mode})
    dataset, job = trainer.train_dataset, trainer._job
    tokenizer = load_job_tokenizer(job, load_samples(job.data, seed=0))
    counts = load_token_counts(dataset.samples, tokenizer=tokenizer, data=job.data)
    assert counts.tolist() == [len(dataset[i]["input_ids"]) for i in range(len(dataset))]
    assert len(set(counts.tolist())) > 1
