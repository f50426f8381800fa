"""Prompt, tokenizers, encoding, dataset and batches, against the reference's numbers."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from data_files import annotation_records, write_episodes, write_json, write_r2r, write_scalevln  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402
from transformers import AutoImageProcessor, AutoTokenizer  # noqa: E402

from janus_cluster.errors import TrainingFailed, UsageError  # noqa: E402
from janus_cluster.janusvln.data.dataset import NavigationDataset, collate  # noqa: E402
from janus_cluster.janusvln.data.encode import SampleEncoder  # noqa: E402
from janus_cluster.janusvln.data.index import load_samples  # noqa: E402
from janus_cluster.janusvln.data.lengths import load_token_counts  # noqa: E402
from janus_cluster.janusvln.data.pool import run_tasks  # noqa: E402
from janus_cluster.janusvln.data.prompt import (  # noqa: E402
    render_conversation,
    render_prompt_parts,
    render_target_parts,
    render_user_parts,
    sample_texts,
)
from janus_cluster.janusvln.data.text_counts import count_rows, count_texts, whole_table  # noqa: E402
from janus_cluster.janusvln.data.tokenizer import (  # noqa: E402
    build_tiny_tokenizer,
    image_token_ids,
    load_tokenizer,
    write_processing_files,
)
from janus_cluster.job.resources import vectors_dir  # noqa: E402
from janus_cluster.job.schema import Data, SegmentWeights  # noqa: E402

pytestmark = pytest.mark.train

FIXTURE = vectors_dir() / "data_pipeline_tiny_seed0"
EXPECTED = json.loads((Path(__file__).parent / "fixtures" / "data_pipeline_tiny.json").read_text())
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
PAD_GRID = (1, 46, 46)
SMALL = {"image_width": 56, "min_pixels": 784, "image_mode": "pad"}


def load_reference(history: int, **keys):
    settings = {"validation_fraction": 0, "max_bad_fraction": 1, "image_mode": "pad", **keys}
    data = Data(roots=[str(FIXTURE / "episodes")], history=history, **settings)
    return data, load_samples(data, seed=0, pad_history=True).train


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(FIXTURE / "tokenizer")


@pytest.fixture(scope="module")
def tiny():
    return build_tiny_tokenizer(sample_texts(load_reference(2)[1]))


def make_annotation(folder: Path) -> Path:
    return write_json(folder / "data.json", annotation_records(folder))


def run_lengths(values) -> list[list[float]]:
    runs: list[list[float]] = []
    for value in values.tolist():
        if runs and runs[-1][0] == value:
            runs[-1][1] += 1
        else:
            runs.append([value, 1])
    return runs


def test_prompt_and_target_are_the_references_word_for_word():
    sample = load_reference(2)[1][21]
    parts = render_user_parts(sample.instruction, num_history=2)
    assert "<image>".join(parts) == EXPECTED["prompt"]
    assert "".join(p.text for p in render_target_parts(sample) if not p.closing) == EXPECTED["target"]


@pytest.mark.parametrize("history", [8, 2])
def test_ids_labels_weights_and_segments_are_the_references(tokenizer, history):
    encoder = SampleEncoder(tokenizer, SegmentWeights())
    for sample, wanted in zip(load_reference(history)[1], EXPECTED["samples"][str(history)], strict=True):
        got = encoder.encode(sample, [PAD_GRID] * wanted["grids"])
        ids, first = got.input_ids.tolist(), wanted["first_label"]
        assert len(ids) == wanted["num_tokens"]
        if "ids" in wanted:
            assert run_lengths(got.input_ids) == wanted["ids"]
        assert hashlib.sha256(json.dumps(ids).encode()).hexdigest() == wanted["ids_sha256"], sample.id
        assert got.labels.tolist() == [-100] * first + ids[first:]
        assert run_lengths(got.loss_weights) == wanted["weights"]
        assert run_lengths(got.segment_ids) == wanted["segments"]


@pytest.mark.parametrize("num_history", [0, 1, 3])
@pytest.mark.parametrize("which", ["tokenizer", "tiny"])
def test_encoding_in_parts_equals_tokenising_the_whole(request, which, num_history):
    tokenizer = request.getfixturevalue(which)
    for sample in load_reference(2)[1]:
        whole = IMAGE.join(render_prompt_parts(sample.instruction, num_history=num_history))
        whole += "".join(part.text for part in render_target_parts(sample))
        shown = replace(sample, frames=(sample.frames[-1],) * (num_history + 1))
        got = SampleEncoder(tokenizer, SegmentWeights()).encode(shown, [(1, 2, 2)] * (num_history + 1))
        assert got.input_ids.tolist() == tokenizer.encode(whole, add_special_tokens=False)


def test_a_segment_weight_of_zero_is_zero(tokenizer):
    weights = SegmentWeights(subinstruction=0, description_2d=0.5, description_3d=2, action=0)
    got = SampleEncoder(tokenizer, weights).encode(load_reference(2)[1][0], [PAD_GRID] * 3)
    for segment, weight in ((1, 0.0), (2, 0.5), (3, 2.0)):
        assert set(got.loss_weights[got.segment_ids == segment].tolist()) == {weight}
    assert got.loss_weights[got.segment_ids == 4].tolist()[-2:] == [1.0, 1.0]  # <|im_end|> and the line end
    assert set(got.loss_weights[got.segment_ids == 4].tolist()[:-2]) == {0.0}


def test_trajectories_and_conversations_have_the_ids_of_upstreams_text(tokenizer, tmp_path):
    root = write_r2r(tmp_path, episodes=1)
    (record,) = upstream_records(root)
    conversation = write_json(tmp_path / "conversation.json", [record])
    question = record["conversations"][0]["value"].replace("<image>\n", "<image>").replace("<image>", IMAGE)
    turns = (("system", "You are a helpful assistant."), ("user", question))
    wanted = "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in turns) + "<|im_start|>assistant\n"
    for path in (root, conversation):
        sample = load_samples(Data(roots=[str(path)], validation_fraction=0), seed=0).train[-1]
        got = SampleEncoder(tokenizer, SegmentWeights()).encode(sample, [(1, 2, 2)] * len(sample.frames))
        assert got.input_ids[got.labels == -100].tolist() == tokenizer.encode(wanted, add_special_tokens=False)
        assert tokenizer.decode(got.input_ids[got.labels != -100]) == "STOP<|im_end|>\n"


def upstream_records(root: Path) -> list[dict]:
    """The last sample of an episode as upstream's create_data.py writes it."""
    frames = [str(path) for path in sorted((root / "0").iterdir())]
    prompt = (
        "You are a visual language navigation model, and your should go to the locations to complete the given task. "
        "Compare the observation and instruction to infer your current progress, and then select the correct direction "
        "from the candidates to go to the target location and finish the task.\n"
        f" This is your historical observation:{'<image>' * (len(frames) - 1)}\n"
        " This is your current observation:<image>\n"
        " Your task is to Go to room 0.\n"
        " You should take one of the following actions:\n MOVE_FORWARD\n TURN_LEFT\n TURN_RIGHT\n STOP."
    )
    turns = [{"from": "human", "value": prompt}, {"from": "gpt", "value": "STOP"}]
    return [{"id": "0/3", "conversations": turns, "images": frames}]


@pytest.mark.parametrize("history", [0, 1, 3])
def test_a_shortened_conversation_has_the_line_ends_of_one_written_with_fewer_images(tmp_path, history):
    root = write_r2r(tmp_path, episodes=1)
    conversation = write_json(tmp_path / "conversation.json", upstream_records(root))
    shown = [
        load_samples(Data(roots=[str(path)], validation_fraction=0, history=history), seed=0)
        for path in (root, conversation)
    ]
    trajectory, conversed = (split.train[-1] for split in shown)
    assert render_conversation(conversed) == render_conversation(trajectory)
    while len(conversed.frames) > 1:
        conversed = conversed.without_oldest_frame()
    trajectory = load_samples(Data(roots=[str(root)], validation_fraction=0, history=0), seed=0).train[-1]
    assert render_conversation(conversed) == render_conversation(trajectory)


def test_tiny_tokenizer_is_the_same_in_another_process(tiny, tmp_path):
    code = (
        "import json, sys\n"
        "from janus_cluster.janusvln.data.tokenizer import build_tiny_tokenizer\n"
        "print(json.dumps(build_tiny_tokenizer(json.load(open(sys.argv[1]))).get_vocab(), sort_keys=True))\n"
    )
    texts = tmp_path / "texts.json"
    texts.write_text(json.dumps(list(reversed(sample_texts(load_reference(2)[1])))))
    environment = {**os.environ, "PYTHONHASHSEED": "1", "RAYON_NUM_THREADS": "2"}
    command = [sys.executable, "-c", code, str(texts)]
    run = subprocess.run(command, env=environment, check=True, capture_output=True, text=True, timeout=600)
    assert json.loads(run.stdout) == tiny.get_vocab()


def test_tiny_tokenizer_reads_back_any_text(tiny):
    for text in ("Go to the door.", "Zürich, 日本 🚪\n\n  x"):
        assert tiny.decode(tiny.encode(text)) == text
    ids = image_token_ids(tiny)
    assert tiny.encode(IMAGE) == [ids.vision_start, ids.image_pad, ids.vision_end]


def test_export_files_load_again_with_the_same_ids_and_prompt(tiny, tmp_path):
    data = Data()
    write_processing_files(tmp_path, tokenizer=tiny, data=data)
    loaded = load_tokenizer(tmp_path)
    sample = load_reference(2)[1][5]
    content = []
    for position, text in enumerate(render_user_parts(sample.instruction, num_history=2)):
        content += [{"type": "image"}] * (position > 0) + ([{"type": "text", "text": text}] if text else [])
    messages = [{"role": "user", "content": content}]
    prompt = loaded.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt == IMAGE.join(render_prompt_parts(sample.instruction, num_history=2))
    assert loaded.encode(prompt) == tiny.encode(prompt)
    assert loaded.get_vocab() == AutoTokenizer.from_pretrained(tmp_path).get_vocab()
    assert AutoImageProcessor.from_pretrained(tmp_path).size.longest_edge == data.max_pixels


def test_a_folder_without_qwens_tokenizer_is_named(tmp_path):
    with pytest.raises(UsageError, match=f"no tokenizer can be loaded from {tmp_path}"):
        load_tokenizer(tmp_path)
    with pytest.raises(UsageError, match="nowhere is not a folder"):
        load_tokenizer(tmp_path / "nowhere")


def make_dataset(tokenizer, **keys) -> NavigationDataset:
    settings = {"validation_fraction": 0, "max_bad_fraction": 1, **SMALL, **keys}
    data = Data(roots=[str(FIXTURE / "episodes")], history=2, **settings)
    samples = load_samples(data, seed=0).train
    return NavigationDataset(samples, tokenizer=tokenizer, data=data, segment_weights=SegmentWeights())


def test_a_batch_has_the_promised_shapes_types_and_padding(tokenizer):
    dataset = make_dataset(tokenizer)
    rows = [dataset[i] for i in (0, 3)]
    assert [len(row["frames"]) for row in rows] == [1, 3]  # no padding of a short history
    batch = collate(rows, tokenizer.pad_token_id)
    length = max(len(row["input_ids"]) for row in rows)
    short = len(rows[0]["input_ids"])
    assert short < length
    padding = {"input_ids": tokenizer.pad_token_id, "attention_mask": 0, "mm_token_type_ids": 0, "labels": -100}
    for key, value in {**padding, "loss_weights": 0, "segment_ids": 0}.items():
        assert batch[key].shape == (2, length)
        assert batch[key].dtype == (torch.float32 if key == "loss_weights" else torch.int64)
        assert set(batch[key][0, short:].tolist()) == {value}
    assert batch["attention_mask"].sum(1).tolist() == [short, length]
    assert batch["actions"].tolist() == [row["action"] for row in rows] and batch["actions"].dtype == torch.int64
    assert [(f.dtype, tuple(f.shape)) for f in batch["frames"]] == [
        (torch.uint8, (1, 3, 56, 56)),
        (torch.uint8, (3, 3, 56, 56)),
    ]
    assert batch["image_grid_thw"].tolist() == [[1, 4, 4]] * 4
    image_pad = image_token_ids(tokenizer).image_pad
    assert torch.equal(batch["mm_token_type_ids"], (batch["input_ids"] == image_pad).long())
    assert batch["mm_token_type_ids"].sum(1).tolist() == [4, 12]


def test_loader_workers_give_the_same_batches(tokenizer):
    dataset = make_dataset(tokenizer)
    batches = [
        list(DataLoader(dataset, batch_size=4, num_workers=workers, collate_fn=partial(collate, pad_token_id=0)))
        for workers in (0, 2)
    ]
    assert len(batches[0]) == len(batches[1]) == 6
    for here, there in zip(*batches, strict=True):
        assert torch.equal(here["input_ids"], there["input_ids"])
        assert all(torch.equal(a, b) for a, b in zip(here["frames"], there["frames"], strict=True))


def test_a_dataset_can_be_pickled(tokenizer):
    dataset = make_dataset(tokenizer)
    assert torch.equal(pickle.loads(pickle.dumps(dataset))[4]["input_ids"], dataset[4]["input_ids"])


def test_a_sample_that_is_too_long_is_named_and_never_cut(tokenizer):
    length = len(make_dataset(tokenizer)[3]["input_ids"])
    assert len(make_dataset(tokenizer, max_length=length)[3]["input_ids"]) == length
    with pytest.raises(TrainingFailed, match=f"ep_10/step_3_MOVE_FORWARD.png has {length} tokens, data.max_length is"):
        make_dataset(tokenizer, max_length=length - 1)[3]


def test_history_is_shortened_until_the_sample_fits_and_image_tokens_stay_whole(tokenizer):
    whole = make_dataset(tokenizer)[3]
    limit = len(whole["input_ids"]) - 1
    shortened = make_dataset(tokenizer, max_length=limit, on_too_long="shorten_history")[3]
    assert [len(whole["frames"]), len(shortened["frames"])] == [3, 2]
    assert torch.equal(shortened["frames"], whole["frames"][1:])
    assert shortened["mm_token_type_ids"].sum() == 8 and len(shortened["image_grid_thw"]) == 2
    assert torch.equal(shortened["labels"][shortened["labels"] != -100], whole["labels"][whole["labels"] != -100])
    alone = len(make_dataset(tokenizer)[0]["input_ids"]) - 20
    with pytest.raises(TrainingFailed, match=r"tokens, data\.max_length is"):
        make_dataset(tokenizer, max_length=alone, on_too_long="shorten_history")[3]


@pytest.mark.parametrize("make", [write_episodes, make_annotation, write_r2r, write_scalevln])
@pytest.mark.parametrize("keys", [{}, {"on_too_long": "shorten_history"}, {"history": 0}])
def test_token_counts_are_those_of_the_encoded_samples(tokenizer, tmp_path, make, keys):
    path = make(tmp_path / "data")
    data = Data(roots=[str(path)], **{"history": 2, "validation_fraction": 0, **SMALL, "image_width": 112, **keys})
    if "on_too_long" in keys:
        counts = load_token_counts(load_samples(data, seed=0).train, tokenizer=tokenizer, data=data)
        data = data.model_copy(update={"max_length": int(counts.max()) - 1})
    for _ in range(2):  # counted, then read from beside the index
        samples = load_samples(data, seed=0, index_dir=tmp_path / "index").train
        dataset = NavigationDataset(samples, tokenizer=tokenizer, data=data, segment_weights=SegmentWeights())
        lengths = [len(dataset[i]["input_ids"]) for i in range(len(dataset))]
        assert load_token_counts(samples, tokenizer=tokenizer, data=data).tolist() == lengths
    assert len(list((tmp_path / "index").rglob("tokens-*.npy"))) == 1


def test_processes_count_what_this_process_counts(tokenizer, tmp_path):
    root = str(write_episodes(tmp_path / "data", episodes=4))
    data = Data(roots=[root], validation_fraction=0, history=2, **SMALL)
    (store,) = load_samples(data, seed=0, index_dir=tmp_path / "index").train.stores
    tokenizer.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    tasks = [
        partial(count_rows, store.folder, (n, n + 4), 2, False, tmp_path / "tokenizer.json") for n in range(0, 16, 4)
    ]
    counts = [result.tolist() for result in run_tasks(tasks, 2)]
    table = whole_table(store, max_history=2, pad_history=False)
    assert [count for part in counts for count in part] == count_texts(table, tokenizer.backend_tokenizer).tolist()
    assert len({tuple(part) for part in counts}) == 1 < len(set(counts[0])), "four steps of each of the four episodes"


def test_samples_that_are_too_long_are_named_before_training(tokenizer, tmp_path):
    root = str(write_episodes(tmp_path / "data"))
    data = Data(roots=[root], validation_fraction=0, max_length=64, **SMALL)
    for policy, fits in (("fail", "--set data.on_too_long=shorten_history"), ("shorten_history", "data.max_length=")):
        policed = data.model_copy(update={"on_too_long": policy})
        with pytest.raises(
            UsageError, match=r"12 of 12 samples have more tokens than data\.max_length \(64\)"
        ) as caught:
            load_token_counts(load_samples(policed, seed=0).train, tokenizer=tokenizer, data=policed)
        assert "ep_0/step_0000_MOVE_FORWARD.png: " in caught.value.message
        assert fits in str(caught.value.hint)


def test_a_plain_action_has_one_segment_and_the_actions_weight(tokenizer, tmp_path):
    data = Data(roots=[str(write_scalevln(tmp_path))], validation_fraction=0, **SMALL)
    row = NavigationDataset(
        load_samples(data, seed=0).train, tokenizer=tokenizer, data=data, segment_weights=SegmentWeights()
    )[0]
    labels = row["labels"] != -100
    assert tokenizer.decode(row["input_ids"][labels]) == "MOVE_FORWARD<|im_end|>\n"
    assert set(row["segment_ids"][labels].tolist()) == {4}
    assert row["loss_weights"][labels].tolist()[-2:] == [1.0, 1.0]
    assert set(row["loss_weights"][labels].tolist()[:-2]) == {3.0}


def test_counts_that_cannot_be_kept_are_still_given_and_kept_ones_are_for_all(tokenizer, tmp_path):
    data = Data(roots=[str(write_episodes(tmp_path / "data"))], validation_fraction=0, **SMALL)
    table = load_samples(data, seed=0, index_dir=tmp_path / "index").train
    counts = load_token_counts(table, tokenizer=tokenizer, data=data)
    (kept,) = (tmp_path / "index").rglob("tokens-*.npy")
    assert kept.stat().st_mode & 0o777 == 0o644
    shutil.rmtree(kept.parent)  # as good as a full disk or another user's folder: nothing can be written there
    assert load_token_counts(table, tokenizer=tokenizer, data=data).tolist() == counts.tolist()


def test_a_tokenizer_without_its_settings_pads_all_the_same(tmp_path):
    shutil.copy(FIXTURE / "tokenizer" / "tokenizer.json", tmp_path)
    assert load_tokenizer(tmp_path).pad_token == "<|endoftext|>"
