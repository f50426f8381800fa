"""A tiny model is judged: by its head, in words, on one rank or several, and from the command line."""

from __future__ import annotations

import gzip
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_export import Tiny, make_tiny
from training_run import write_run_folder
from transformers.modeling_outputs import BaseModelOutputWithPooling

from janus_cluster.errors import UsageError
from janus_cluster.janusvln.data.dataset import collate
from janus_cluster.janusvln.data.samples import ACTIONS, Sample
from janus_cluster.janusvln.held_out import ScoreSums, predict_batches, share_batches
from janus_cluster.janusvln.loss import SEGMENT_NAMES
from janus_cluster.janusvln.model import pixels
from janus_cluster.janusvln.model.generate import generate_greedy
from janus_cluster.janusvln.model.janus import JanusModel
from janus_cluster.janusvln.predictions import Prediction
from janus_cluster.training.report import ShownSample, render_page
from janus_cluster.training.subject import draw_indices, load_subject

pytestmark = pytest.mark.train

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return make_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def exported(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.export(tmp_path_factory.mktemp("export"))


def judge(tiny: Tiny, samples: tuple[Sample, ...], *, rows: int, world_size: int) -> Any:
    """Scores of all ranks' shares, added up in this one process."""
    sums = ScoreSums(CPU)
    for rank in range(world_size):
        for result in predict_batches(
            tiny.model,
            tiny.dataset(samples),
            num_samples=len(samples),
            collate=partial(collate, pad_token_id=tiny.tokenizer.pad_token_id),
            device=CPU,
            rows=rows,
            num_workers=0,
            rank=rank,
            world_size=world_size,
        ):
            sums.add(result)
    return sums.scores()


@pytest.mark.parametrize(("num_samples", "world_size", "rows"), [(7, 2, 2), (8, 2, 2), (1, 4, 3), (5, 2, 2), (9, 4, 1)])
def test_every_rank_has_as_many_batches_and_every_sample_counts_once(
    num_samples: int, world_size: int, rows: int
) -> None:
    shares = [share_batches(num_samples, rank=rank, world_size=world_size, rows=rows) for rank in range(world_size)]
    assert len({len(batches) for batches, _ in shares}) == 1
    counted = [index for batches, num_counted in shares for batch in batches[:num_counted] for index in batch]
    assert sorted(counted) == list(range(num_samples))
    assert all(batch for batches, _ in shares for batch in batches)


def test_scores_do_not_depend_on_how_the_samples_are_shared_out(tiny: Tiny) -> None:
    samples = tiny.samples[:5]
    alone = judge(tiny, samples, rows=1, world_size=1)
    shared = judge(tiny, samples, rows=2, world_size=2)
    assert shared.head == alone.head and alone.head.num_samples == 5
    assert shared.perplexity_by_segment == pytest.approx(alone.perplexity_by_segment, rel=1e-5)


def test_perplexity_is_that_of_the_unweighted_cross_entropy(tiny: Tiny) -> None:
    samples = tiny.samples[:2]
    found = judge(tiny, samples, rows=2, world_size=1).perplexity_by_segment
    losses: dict[int, list[torch.Tensor]] = {segment: [] for segment in range(1, 5)}
    for sample in samples:
        batch = collate([tiny.dataset((sample,))[0]], pad_token_id=tiny.tokenizer.pad_token_id)
        logits = naive_logits(tiny.model, batch["input_ids"], batch)
        for position in range(1, batch["labels"].shape[1]):
            if batch["labels"][0, position] != -100:
                loss = -logits[0, position - 1].log_softmax(-1)[batch["labels"][0, position]]
                losses[int(batch["segment_ids"][0, position])].append(loss)
    for number, name in enumerate(SEGMENT_NAMES, 1):
        assert found[name] == pytest.approx(float(torch.stack(losses[number]).mean().exp()), rel=1e-4), name


@torch.no_grad()
def naive_logits(model: JanusModel, input_ids: torch.Tensor, item: dict[str, Any]) -> torch.Tensor:
    """Everything computed anew: images, memory, all positions."""
    frames = item["frames"][0]
    fused = model.encode_images(pixels.qwen_patches(frames), item["image_grid_thw"], [pixels.unit_frames(frames)])
    out = model.model(
        input_ids=input_ids,
        mm_token_type_ids=(input_ids == model.config.image_token_id).long(),
        image_grid_thw=item["image_grid_thw"],
        mm_encoder_outputs={"image": BaseModelOutputWithPooling(pooler_output=fused)},
        use_cache=False,
    )
    return model.lm_head(out.last_hidden_state)


def greedy(tiny: Tiny, item: dict[str, Any], **options: Any) -> list[int]:
    length = int((item["labels"] != -100).int().argmax())
    return generate_greedy(
        tiny.model,
        input_ids_L=item["input_ids"][:length],
        mm_token_type_ids_L=item["mm_token_type_ids"][:length],
        frames_S3HW=item["frames"],
        image_grid_thw=item["image_grid_thw"],
        **options,
    )


def test_decoding_with_the_cache_gives_what_reading_everything_again_gives(tiny: Tiny) -> None:
    # Three frames: text goes on after images at other positions than the count of tokens.
    sample = next(sample for sample in tiny.samples if len(sample.frames) == 3)
    item = tiny.dataset((sample,))[0]
    batch = collate([item], pad_token_id=tiny.tokenizer.pad_token_id)
    ids = item["input_ids"][: int((item["labels"] != -100).int().argmax())][None]
    expected: list[int] = []
    for _ in range(12):
        expected.append(int(naive_logits(tiny.model, ids, batch)[0, -1].argmax()))
        ids = torch.cat((ids, torch.tensor([[expected[-1]]])), dim=1)
    assert greedy(tiny, item, max_new_tokens=12, stop_ids=()) == expected
    assert len(set(expected)) > 2, "a model that repeats one token would hide a wrong position"
    first_stop = expected.index(expected[5])
    assert greedy(tiny, item, max_new_tokens=12, stop_ids={expected[5]}) == expected[:first_stop]


def test_the_answer_depends_on_the_spatial_memory(tiny: Tiny) -> None:
    item = tiny.dataset(tiny.samples[-1:])[0]
    with_memory = greedy(tiny, item, max_new_tokens=24, stop_ids=())
    lam = tiny.model.config.lam
    try:
        tiny.model.config.lam = 20.0
        changed = greedy(tiny, item, max_new_tokens=24, stop_ids=())
    finally:
        tiny.model.config.lam = lam
    assert with_memory != changed


@pytest.fixture(autouse=True)
def janus_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Indexes that no run keeps are in the test's own folder."""
    monkeypatch.setenv("JANUS_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def run_eval(*argv: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "janus_cluster.cli", "eval", *argv],
        cwd=cwd, capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip


def test_an_export_is_judged_from_the_command_line(tiny: Tiny, exported: Path, tmp_path: Path) -> None:
    options = ("--data", str(tiny.episodes), "--samples", "4", "--generate", "2", "--max-new-tokens", "8")
    done = run_eval(str(exported), *options, "--device", "cpu", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    evaluation = json.loads(done.stdout)
    assert evaluation == json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())
    lines = (tmp_path / "evaluation" / "predictions.jsonl").read_text().splitlines()
    predictions = [json.loads(line) for line in lines]
    chosen = tuple(tiny.samples[i] for i in draw_indices(len(tiny.samples), 4))
    assert [p["id"] for p in predictions] == [sample.id for sample in chosen]
    asked = draw_indices(4, 2)
    assert [i for i, p in enumerate(predictions) if p["generated"] is not None] == asked
    right = sum(p["head_action"] == p["action"] for p in predictions)
    assert evaluation["head"]["accuracy"] == pytest.approx(right / 4)
    assert evaluation["generated"]["num_samples"] == 2
    expected = judge(tiny, chosen, rows=1, world_size=1)
    assert evaluation["head"] == json.loads(json.dumps(expected.head.to_json()))
    assert evaluation["perplexity_by_segment"] == pytest.approx(dict(expected.perplexity_by_segment), rel=1e-4)
    page = (tmp_path / "evaluation" / "predictions.html").read_text()
    assert page.count("data:image/jpeg;base64,") == sum(len(chosen[i].frames) for i in asked)


def test_an_export_needs_data_and_vggt(exported: Path, tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="which episodes") as missing:
        load_subject(exported)
    assert "--data ROOT" in str(missing.value.hint)
    bare = tmp_path / "bare"
    shutil.copytree(exported, bare)
    (bare / "vggt.safetensors").unlink()
    with pytest.raises(UsageError, match=r"no vggt\.safetensors beside it") as nowhere:
        load_subject(bare, roots=[str(tiny.episodes)])
    assert "--vggt-path" in str(nowhere.value.hint)
    with pytest.raises(UsageError, match=r"--vggt-path: .*no such file or folder"):
        load_subject(bare, roots=[str(tiny.episodes)], vggt_path=str(tmp_path / "no"))
    assert load_subject(bare, roots=[str(tiny.episodes)], vggt_path=str(exported)).has_action_head


def write_published(exported: Path, folder: Path, *, without: tuple[str, ...] = ("action_head.",)) -> Path:
    """The export as JanusVLN_Base is published: VGGT among the tensors, no action head."""
    shutil.copytree(exported, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(without)}
    tensors |= {f"vggt.{name}": tensor for name, tensor in load_file(folder / "vggt.safetensors").items()}
    (folder / "vggt.safetensors").unlink()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_head_that_the_folder_does_not_hold_is_not_scored_and_vggt_is_taken_from_inside(
    tiny: Tiny, exported: Path, tmp_path: Path
) -> None:
    published = write_published(exported, tmp_path / "published")
    options = ("--samples", "3", "--generate", "1", "--max-new-tokens", "4", "--device", "cpu")
    done = run_eval(str(published), "--data", str(tiny.episodes), *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"action head: {published} holds no action_head.*" in done.stdout and "not scored" in done.stdout
    assert "action head: true action by row" not in done.stdout
    evaluation = json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())
    assert "not scored" in evaluation["head_not_scored"]
    assert (evaluation["head"]["accuracy"], evaluation["head"]["num_samples"]) == (None, 0)
    assert evaluation["generated"]["num_samples"] == 1 and evaluation["majority"]["accuracy"] > 0
    chosen = tuple(tiny.samples[i] for i in draw_indices(len(tiny.samples), 3))
    expected = judge(tiny, chosen, rows=1, world_size=1).perplexity_by_segment
    assert evaluation["perplexity_by_segment"] == pytest.approx(dict(expected), rel=1e-4)
    for line in (tmp_path / "evaluation" / "predictions.jsonl").read_text().splitlines():
        assert json.loads(line)["head_action"] is json.loads(line)["head_probabilities"] is None
    assert "head <b" not in (tmp_path / "evaluation" / "predictions.html").read_text()


def test_a_model_without_a_merger_is_not_evaluated(tiny: Tiny, exported: Path, tmp_path: Path) -> None:
    plain = write_published(exported, tmp_path / "plain", without=("action_head.", "merger."))
    with pytest.raises(UsageError, match=r"holds no merger\.\*"):
        load_subject(plain, roots=[str(tiny.episodes)])


def write_trajectories(tmp_path: Path) -> tuple[Path, Path]:
    """R2R's file, and its frames elsewhere."""
    file, frames = tmp_path / "r2r" / "train.json.gz", tmp_path / "frames"
    episodes = [{"episode_id": 7, "instruction": {"instruction_text": "Go."}, "scene_id": "s"}]
    file.parent.mkdir()
    file.write_bytes(gzip.compress(json.dumps({"episodes": episodes}).encode()))
    (frames / "7").mkdir(parents=True)
    for number, action in enumerate(("MOVE_FORWARD", "STOP")):
        Image.new("RGB", (160, 120), (number, 9, 9)).save(frames / "7" / f"step_{number}_{action}.png")
    return file, frames


def test_the_folder_of_frames_can_be_named(exported: Path, tmp_path: Path) -> None:
    file, frames = write_trajectories(tmp_path)
    with pytest.raises(UsageError) as unnamed:
        load_subject(exported, roots=[str(file)]).load_samples()
    assert "--data '{path: …, images: …}'" in str(unnamed.value.hint) and "data.roots" not in str(unnamed.value)
    subject = load_subject(exported, roots=[f"{{path: {file}, images: {frames}}}"])
    assert [sample.action for sample in subject.load_samples().samples] == [
        ACTIONS.index("MOVE_FORWARD"),
        ACTIONS.index("STOP"),
    ]
    for wrong in ("{path: /x, image: /y}", "{path: /x", "{images: /y}"):
        with pytest.raises(UsageError, match="--data ") as refused:
            load_subject(exported, roots=[wrong])
        assert "images: FOLDER" in str(refused.value.hint)


def test_an_export_is_prepared_as_it_was_for_training(exported: Path, tiny: Tiny) -> None:
    subject = load_subject(exported, roots=[str(tiny.episodes)])
    prepared = tiny.job.data
    assert (subject.data.history, subject.data.image_width) == (prepared.history, prepared.image_width)
    assert len(subject.load_samples().samples) == len(tiny.samples), "nothing of named data is left out"


def test_data_is_read_once_for_all_evaluations(
    exported: Path, tiny: Tiny, tmp_path: Path, janus_home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def load(target: Path, *roots: str) -> str:
        load_subject(target, roots=roots).load_samples()
        return capsys.readouterr().out.splitlines()[-1]

    named = str(tiny.episodes)
    assert " read in " in load(exported, named) and "index checked in" in load(exported, named)
    assert len(list((janus_home / "data_index").iterdir())) == 1
    run = write_run_folder(tmp_path / "runs" / "run", tiny.job.model_dump() | {"nodes": 1})
    shutil.copytree(exported, run.export)
    assert " read in " in load(run.path, named) and "index checked in" in load(run.path, named)
    assert len(list(run.data_index.iterdir())) == 1, "beside the runs, where training keeps its own"


def test_data_is_read_where_no_index_can_be_kept(
    exported: Path, tiny: Tiny, janus_home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    janus_home.write_text("no folder")
    for _ in range(2):
        assert len(load_subject(exported, roots=[str(tiny.episodes)]).load_samples().samples) == len(tiny.samples)
        assert " read in " in capsys.readouterr().out


def test_nothing_in_the_page_is_markup_but_its_own(tiny: Tiny) -> None:
    nasty = "<script>alert(1)</script>\"'&<img src=x onerror=alert(1)>"
    prediction = Prediction(
        id=nasty, episode=nasty, instruction=nasty, frames=(nasty,), action="STOP", target=nasty,
        head_action="STOP", head_probabilities=dict.fromkeys(ACTIONS, 0.25), generated=nasty, stopped=False,
    )  # fmt: skip
    page = render_page(nasty, [nasty], [ShownSample(prediction=prediction, pictures=("data:image/jpeg;base64,AA",))])
    assert "<script" not in page and "<img src=x" not in page
    assert page.count("&lt;script&gt;") == 7
    assert "no action named" in page and "cut off" in page
    foreign = replace(prediction, id="name\udcff")
    assert "name\\udcff" in render_page("t", [], [ShownSample(prediction=foreign, pictures=())])
    silent = replace(prediction, generated=None, stopped=None)
    assert "in words" not in render_page("t", [], [ShownSample(prediction=silent, pictures=())])


def test_the_same_samples_are_drawn_every_time_and_each_once() -> None:
    drawn = draw_indices(100, 40)
    assert drawn == draw_indices(100, 40) == sorted(set(drawn))
    assert len(drawn) == 40
    assert draw_indices(3, 5) == [0, 1, 2]
    assert draw_indices(3, 0) == []
