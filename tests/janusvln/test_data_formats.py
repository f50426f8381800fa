"""Every format and alias gives its samples; damage ends as a listed problem or a UsageError."""

from __future__ import annotations

import gzip
import json
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from data_files import (
    FRAME,
    annotation_records,
    four_part_records,
    make_png,
    write_episodes,
    write_frames,
    write_json,
    write_r2r,
    write_scalevln,
)
from PIL import Image

from janus_cluster.errors import UsageError
from janus_cluster.janusvln.data.index import SampleSplit, load_samples
from janus_cluster.janusvln.data.prompt import render_conversation, render_target_parts
from janus_cluster.job.schema import Data


def load(path: Path, **keys: Any) -> SampleSplit:
    root = {name: keys.pop(name) for name in ("format", "images") if name in keys}
    settings = {"validation_fraction": 0, "max_bad_fraction": 1, **keys}
    return load_samples(Data(roots=[{"path": str(path), **root}], **settings), seed=0)


def write_records(folder: Path, records: list[Any], name: str = "data.json") -> Path:
    if name.endswith("jsonl"):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("\n".join(json.dumps(record) for record in records) + "\n\n")
        return folder / name
    return write_json(folder / name, records)


def make_json(folder: Path) -> Path:
    return write_records(folder, four_part_records(folder))


def make_jsonl(folder: Path) -> Path:
    return write_records(folder, four_part_records(folder), "data.jsonl")


def make_annotation(folder: Path) -> Path:
    return write_records(folder, annotation_records(folder))


MAKERS: dict[str, Callable[[Path], Path]] = {
    "episodes": write_episodes,
    "json": make_json,
    "jsonl": make_jsonl,
    "annotation": make_annotation,
    "r2r": write_r2r,
    "scalevln": write_scalevln,
}


def target(sample: Any) -> str:
    return "".join(part.text for part in render_target_parts(sample))


@pytest.mark.parametrize("name", MAKERS)
def test_every_format_is_recognised_from_the_content(tmp_path, name):
    split = load(MAKERS[name](tmp_path / "data"))
    assert (len(split.train), split.num_bad) == ({"episodes": 12, "r2r": 12, "scalevln": 12}.get(name, 6), 0)
    for sample in split.train:
        assert all(frame.is_file() for frame in sample.frames)
        assert len(render_conversation(sample)) == len(sample.frames) + 1
        four_parts = name in ("episodes", "json", "jsonl")
        assert target(sample).startswith("SUBINSTRUCTION: ") == four_parts
        assert target(sample).endswith("<|im_end|>\n")


def test_a_json_sample_reads_all_of_its_fields(tmp_path):
    sample = load(make_json(tmp_path)).train[4]
    assert (sample.id, sample.episode, sample.instruction) == ("walk_1/4", "walk_1", "Go to the door.")
    assert target(sample) == (
        "SUBINSTRUCTION: Turn around.\n2D_DESCRIPTION: A lamp 4.\n3D_DESCRIPTION: 2 m away.\n"
        "ACTION: MOVE_FORWARD<|im_end|>\n"
    )
    assert [frame.name for frame in sample.frames] == ["2.png", "3.png", "4.png"]


ALIASES = {
    "instruction": ["instruction_text", "full_instruction", "instructions"],
    "subinstruction": ["sub_instruction", "sub_instruction_text"],
    "2D_description": ["2d_description", "description_2d"],
    "3D_description": ["3d_description", "description_3d"],
    "action": ["action_label", "actions"],
    "images": ["image"],
}


@pytest.mark.parametrize(("name", "alias"), [(name, alias) for name, names in ALIASES.items() for alias in names])
def test_an_alias_means_the_same(tmp_path, name, alias):
    records = four_part_records(tmp_path)
    plain = list(load(write_records(tmp_path, records)).train)
    for record in records:
        value = record.pop(name)
        record[alias] = [value] if alias == "instructions" else value
    assert list(load(write_records(tmp_path, records, "aliases.json")).train) == plain


def test_numbers_are_actions_and_history_may_be_apart(tmp_path):
    records = four_part_records(tmp_path)
    plain = list(load(write_records(tmp_path, records)).train)
    for record in records:
        record["action"] = ["STOP", "MOVE_FORWARD", "TURN_LEFT", "TURN_RIGHT"].index(record["action"])
        *record["history_images"], record["current_image"] = record.pop("images")
    assert list(load(write_records(tmp_path, records, "apart.json")).train) == plain


def test_images_are_under_the_roots_images_or_the_records_data_path(tmp_path):
    records = four_part_records(tmp_path / "pixels")
    plain = [s.frames for s in load(write_records(tmp_path / "pixels", records)).train]
    path = write_records(tmp_path / "texts", records)
    assert [s.frames for s in load(path, images=str(tmp_path / "pixels")).train] == plain
    path = write_records(tmp_path / "texts", [{**r, "data_path": str(tmp_path / "pixels")} for r in records])
    assert [s.frames for s in load(path).train] == plain


def test_the_job_limits_the_history_of_listed_images_too(tmp_path):
    sample = load(make_json(tmp_path), history=1).train[5]
    assert [frame.name for frame in sample.frames] == ["3.png", "5.png"]


def test_a_conversation_is_kept_word_for_word_and_its_answer_is_the_target(tmp_path):
    path = make_annotation(tmp_path)
    sample = load(path).train[5]
    image = "<image>"
    wanted = json.loads(path.read_text())[5]["conversations"][0]["value"]
    assert image.join(sample.user_parts) == wanted
    assert target(sample) == "TURN_LEFT<|im_end|>\n"
    shorter = load(path, history=1).train[5]
    assert image.join(shorter.user_parts) == wanted.replace("<image><image>", "<image>")
    assert image.join(shorter.without_oldest_frame().user_parts) == wanted.replace("<image><image>", "")


def test_a_conversation_with_four_parts_has_four_segments(tmp_path):
    records = annotation_records(tmp_path)
    answer = "SUBINSTRUCTION: Go on.\n2D_DESCRIPTION: A sofa.\n3D_DESCRIPTION: 1 m.\nACTION: STOP"
    records[0]["conversations"][1]["value"] = answer
    sample = load(write_records(tmp_path, records)).train[0]
    assert target(sample) == answer + "<|im_end|>\n"
    assert [part.segment for part in render_target_parts(sample)] == [1, 2, 3, 4, 4]


def test_trajectories_of_r2r_take_their_actions_from_the_names(tmp_path):
    split = load(write_r2r(tmp_path))
    assert [(s.id, s.action) for s in split.train][:4] == [
        ("0/step_0_MOVE_FORWARD.png", 1),
        ("0/step_1_TURN_LEFT.png", 2),
        ("0/step_2_TURN_RIGHT.png", 3),
        ("0/step_3_STOP.png", 0),
    ]
    prompt = "<image>".join(render_conversation(split.train[1]))
    assert "\n This is your historical observation:<image> This is your current observation:<image> Your" in prompt
    assert prompt.endswith(
        " Your task is to Go to room 0.\n You should take one of the following actions:\n MOVE_FORWARD\n TURN_LEFT"
        "\n TURN_RIGHT\n STOP.<|im_end|>\n<|im_start|>assistant\n"
    )


def test_trajectories_of_scalevln_take_the_next_action_and_end_with_stop(tmp_path):
    split = load(write_scalevln(tmp_path))
    assert [s.action for s in split.train][:4] == [1, 2, 3, 0]
    assert (split.train[3].id, split.train[3].episode) == ("100/003.jpg", "images/walk_0")
    named = load(tmp_path / "annotations.json", format="trajectories", images=str(tmp_path / "images"))
    assert [s.id for s in named.train] == [s.id for s in split.train]


def test_a_forced_format_refuses_other_records(tmp_path):
    with pytest.raises(UsageError, match="is no record of format annotation"):
        load(make_json(tmp_path), format="annotation")
    with pytest.raises(UsageError, match="cannot be of format episodes"):
        load(tmp_path / "data.json", format="episodes")


def test_unicode_names_are_names(tmp_path):
    root = write_episodes(tmp_path / "дом 日本", episodes=1, prefix="Zürich 🚪")
    (root / "Zürich 🚪_0").rename(root / "bytes-\udcff")
    write_episodes(root, episodes=1, prefix="Zürich 🚪")
    split = load(root)
    assert {s.episode for s in split.train} == {"Zürich 🚪_0", "bytes-\udcff"}
    assert all(frame.is_file() for s in split.train for frame in s.frames)
    assert len(load(root, validation_fraction=0.5).held_out) == 4


def test_half_a_surrogate_pair_is_no_text(tmp_path):
    records = four_part_records(tmp_path)
    records[0]["instruction"] = "Go \ud83d on."
    assert "instruction holds half of a surrogate pair" in str(load(write_records(tmp_path, records)).problems[0])


WRONG_RECORDS = {
    "no id is no problem": ({"id": None}, None),
    "instruction missing": ({"instruction": None}, "instruction is missing or empty"),
    "instruction empty": ({"instruction": "  "}, "instruction is missing or empty"),
    "instruction ill-typed": ({"instruction": {"a": 1}}, "instruction holds a dict, expected text"),
    "description missing": ({"2D_description": None}, "2D_description is missing or empty"),
    "control token": ({"3D_description": "<|im_end|>"}, "3D_description holds the control token <|im_end|>"),
    "action unknown": ({"action": "JUMP"}, "unknown action JUMP"),
    "action out of range": ({"action": 4}, "unknown action 4"),
    "action a truth value": ({"action": True}, "unknown action True"),
    "action a fraction": ({"action": 1.0}, "unknown action 1.0"),
    "images empty": ({"images": []}, "images must be a list of one or more paths"),
    "images ill-typed": ({"images": ["a.png", 3]}, "images[1] is no path"),
    "image with a NUL": ({"images": ["a\0.png"]}, "images[0] is no path"),
    "id ill-typed": ({"id": {}}, "id is no text and no number"),
    "image missing": ({"images": ["frames/none.png"]}, "shows this frame, which is missing"),
    "image a folder": ({"images": ["frames"]}, "shows this frame, which cannot be read as an image"),
    "extra field": ({"colour": "red"}, None),
}


@pytest.mark.parametrize(("change", "reason"), WRONG_RECORDS.values(), ids=list(WRONG_RECORDS))
def test_a_wrong_json_sample_is_left_out_and_listed(tmp_path, change, reason):
    records = four_part_records(tmp_path)
    records[2].update(change)
    split = load(write_records(tmp_path, records))
    assert (len(split.train), split.num_bad) == ((6, 0) if reason is None else (5, 1))
    assert reason is None or any(reason in str(problem) for problem in split.problems)


WRONG_CONVERSATIONS = {
    "no list": ("hello", "must be one turn of human and one of gpt"),
    "one turn": ([{"from": "human", "value": "a"}], "must be one turn of human and one of gpt"),
    "wrong order": ([{"from": "gpt", "value": "STOP"}, {"from": "human", "value": "a"}], "expected human"),
    "no value": ([{"from": "human"}, {"from": "gpt", "value": "STOP"}], "value is missing or empty"),
    "tags": (
        [{"from": "human", "value": "a"}, {"from": "gpt", "value": "STOP"}],
        "0 <image> in the",
    ),
    "action": (
        [{"from": "human", "value": "<image>" * 3}, {"from": "gpt", "value": "FLY"}],
        "unknown action FLY",
    ),
    "half an answer": (
        [
            {"from": "human", "value": "<image>" * 3},
            {"from": "gpt", "value": "SUBINSTRUCTION: a\n2D_DESCRIPTION:\n3D_DESCRIPTION: b\nACTION: STOP"},
        ],
        "leaves a description empty",
    ),
}


@pytest.mark.parametrize(("turns", "reason"), WRONG_CONVERSATIONS.values(), ids=list(WRONG_CONVERSATIONS))
def test_a_wrong_conversation_is_left_out_and_listed(tmp_path, turns, reason):
    records = annotation_records(tmp_path)
    records[3]["conversations"] = turns
    split = load(write_records(tmp_path, records))
    assert (len(split.train), split.num_bad) == (5, 1)
    assert f"record 3: {reason}" in str(split.problems[0]) or reason in str(split.problems[0])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"actions": [-1, 1]}, "2 actions but 4 frames"),
        ({"actions": "no"}, "actions must be a list of whole numbers"),
        ({"instructions": []}, "instructions is missing or empty"),
        ({"video": 7}, "video is no path"),
        ({"actions": [-1, 1, 9, 1, 0]}, "unknown action 9"),
        ({"actions": [1, 2, 3, 0]}, "actions do not begin with -1 (4 actions, 4 frames in"),
        ({"actions": [1, 2, 3, 0, 0]}, "actions do not begin with -1 (5 actions, 4 frames in"),
        ({"actions": []}, "actions do not begin with -1 (0 actions"),
        ({"actions": [-1, -1, 1, 2]}, "actions[1] is -1, which is valid only as the first"),
        ({"actions": [-1, 1, 2, 0]}, "actions[3] is STOP, but 1 frames follow"),
        ({"actions": [-1, 0, 1, 2, 0]}, "actions[1] is STOP, but 3 frames follow"),
    ],
)
def test_a_wrong_trajectory_is_left_out_and_listed(tmp_path, change, reason):
    records = json.loads((write_scalevln(tmp_path) / "annotations.json").read_text())
    records[1].update(change)
    write_json(tmp_path / "annotations.json", records)
    split = load(tmp_path)
    assert split.num_bad == 1
    assert any(reason in str(problem) for problem in split.problems)


def drop_folders(name: str, root: Path, count: int) -> None:
    """The first trajectories of the annotation lose their folders, as if they had not been rendered."""
    for number in range(count):
        shutil.rmtree(root / (str(number) if name == "r2r" else f"images/walk_{number}"))


@pytest.mark.parametrize("name", ["r2r", "scalevln"])
def test_a_trajectory_that_was_not_rendered_is_absent_and_not_bad(tmp_path, name):
    root = MAKERS[name](tmp_path / "data", episodes=4)
    drop_folders(name, root, 2)
    listed = tmp_path / "bad_data.jsonl"
    data = Data(roots=[str(root)], validation_fraction=0, on_bad="fail")
    split = load_samples(data, seed=0, bad_data=listed)
    assert (len(split.train), split.num_bad) == (8, 0)
    assert f"2 of 4 trajectories (50.0%) have no folder of frames under {root}: not rendered" in split.describe()
    assert "problems" not in split.describe()
    lines = [json.loads(line) for line in listed.read_text().splitlines()]
    assert [(line["samples_lost"], line["absent"]) for line in lines] == [(0, True)] * 2
    assert lines[0]["path"] == str(root / ("0" if name == "r2r" else "images/walk_0"))


def test_more_absent_trajectories_than_allowed_are_refused_with_the_folder_that_was_looked_in(tmp_path):
    write_r2r(tmp_path / "data", episodes=5)
    drop_folders("r2r", tmp_path / "data", 3)
    with pytest.raises(UsageError, match=rf"3 of 5 trajectories .* under {tmp_path}/data, and .* is 0\.5") as caught:
        load(tmp_path / "data")
    assert f"the first of them: {tmp_path}/data/0" in caught.value.message
    assert "--set data.max_absent_fraction=0.60" in str(caught.value.hint)
    assert len(load(tmp_path / "data", max_absent_fraction=0.6).train) == 8
    with pytest.raises(UsageError, match=r"and data\.max_absent_fraction is 0"):
        load(tmp_path / "data", max_absent_fraction=0)


def test_an_annotation_of_which_nothing_was_rendered_is_refused_under_any_policy(tmp_path):
    write_r2r(tmp_path / "data")
    (tmp_path / "elsewhere").mkdir()
    with pytest.raises(UsageError, match=f"3 of 3 trajectories .* under {tmp_path}/elsewhere") as caught:
        load(tmp_path / "data" / "train.json.gz", images=str(tmp_path / "elsewhere"), max_absent_fraction=1)
    assert "images: …" in str(caught.value.hint)
    assert "max_absent_fraction" not in str(caught.value.hint)


def test_a_folder_that_is_there_without_frames_or_is_no_folder_is_bad_and_not_absent(tmp_path):
    write_r2r(tmp_path / "r2r", episodes=4)
    drop_folders("r2r", tmp_path / "r2r", 1)
    (tmp_path / "r2r" / "0").write_text("no folder")
    write_scalevln(tmp_path / "scalevln")
    shutil.rmtree(tmp_path / "scalevln" / "images" / "walk_1" / "rgb")
    for name in ("r2r", "scalevln"):
        split = load(tmp_path / name)
        assert (split.num_bad, split.absent) == (1, ())
        assert "no folder of frames" in str(split.problems[0])


def test_an_episode_of_r2r_without_steps_is_listed(tmp_path):
    write_r2r(tmp_path)
    for frame in (tmp_path / "1").iterdir():
        frame.unlink()
    split = load(tmp_path)
    assert (len(split.train), split.num_bad) == (8, 1)
    assert "1 holds no frame" in str(split.problems[0])


def test_a_broken_line_costs_that_line_only(tmp_path):
    path = make_jsonl(tmp_path)
    path.write_text(path.read_text().replace('{"id": "walk_0/1"', '{"id" "walk_0/1"'))
    split = load(path)
    assert (len(split.train), split.num_bad) == (5, 1)
    assert "record 1: cannot be read as JSON" in str(split.problems[0])


@pytest.mark.parametrize("name", ["json", "jsonl", "annotation", "r2r", "scalevln"])
def test_an_empty_file_of_records_is_refused_under_either_policy(tmp_path, name):
    path = MAKERS[name](tmp_path)
    files = [path] if path.is_file() else [p for p in path.iterdir() if p.is_file()]
    for file in files:
        file.write_bytes(b"")
    for policy in ("skip", "fail"):
        with pytest.raises(UsageError, match=re.escape(str(files[0]))):
            load(path, on_bad=policy)


def test_an_empty_json_of_a_step_or_an_episode_costs_its_samples(tmp_path):
    write_episodes(tmp_path)
    (tmp_path / "ep_0" / "milestones_result.json").write_bytes(b"")
    next((tmp_path / "ep_1").glob("step_0001_*.json")).write_bytes(b"")
    split = load(tmp_path)
    assert (len(split.train), split.num_bad) == (7, 5)


def test_an_episode_without_steps_is_listed(tmp_path):
    write_episodes(tmp_path)
    for file in (tmp_path / "ep_0").glob("step_*"):
        file.unlink()
    split = load(tmp_path)
    assert (len(split.train), split.num_bad) == (8, 1)
    assert "ep_0: holds no step_<number>_<ACTION>" in str(split.problems[0])


@pytest.mark.parametrize(
    ("pixels", "reason"),
    [
        (FRAME[:-20], "is truncated"),
        (b"", "is empty"),
        (b"no image", "cannot be read as an image"),
        (FRAME[:20], "cannot be read as an image"),
        (make_png(32, 60), "with a current one of another shape"),
    ],
)
def test_every_sample_that_shows_a_broken_frame_is_left_out(tmp_path, pixels, reason):
    frame = next(write_episodes(tmp_path).glob("ep_1/step_0002_*.png"))
    frame.write_bytes(pixels)
    split = load(tmp_path)
    shown = [s for s in split.train if s.episode == "ep_1"]
    differs = "shape" in reason
    assert [s.id for s in shown] == [
        f"ep_1/step_000{i}_{name}.png" for i, name in ((0, "MOVE_FORWARD"), (1, "TURN_LEFT"))
    ]
    assert split.num_bad == 2
    assert differs or any(str(p).startswith(f"{frame}: {reason}") for p in split.problems)
    assert any(reason in str(p) and p.lost == 1 for p in split.problems)
    without_history = load(tmp_path, history=0)
    assert without_history.num_bad == (0 if differs else 1), "later samples do not show it"


def test_a_flipped_byte_is_found_by_decoding_only(tmp_path):
    frame = next(write_episodes(tmp_path).glob("ep_1/step_0003_*.png"))
    raw = bytearray(FRAME)
    raw[len(raw) // 2] ^= 0xFF
    frame.write_bytes(bytes(raw))
    assert load(tmp_path).num_bad == 0
    split = load(tmp_path, verify_images="decode")
    assert split.num_bad == 1
    assert f"{frame}: cannot be decoded" in str(split.problems[0])


def test_bad_data_is_refused_or_skipped_by_policy_and_always_listed(tmp_path):
    root = write_episodes(tmp_path / "data", episodes=30)
    next((root / "ep_3").glob("step_0003_*.json")).unlink()
    listed = tmp_path / "bad_data.jsonl"

    def run(**keys: Any) -> SampleSplit:
        return load_samples(Data(roots=[str(root)], **keys), seed=0, bad_data=listed)

    split = run()
    assert (split.num_bad, len(split.train) + len(split.held_out)) == (1, 119)
    with pytest.raises(UsageError, match=r"1 of 120 samples cannot be used \(0\.83%\), and data\.on_bad is fail"):
        run(on_bad="fail")
    with pytest.raises(UsageError, match=r"data\.max_bad_fraction is 0\.005") as caught:
        run(max_bad_fraction=0.005)
    assert "--set data.max_bad_fraction=0.01" in str(caught.value.hint)
    assert str(listed) in str(caught.value.hint)
    assert len(run(max_bad_fraction=1 / 120).problems) == 1, "as many as the limit are allowed"
    (line,) = map(json.loads, listed.read_text().splitlines())
    assert line["reason"] == "is missing" and line["samples_lost"] == 1
    assert line["path"].endswith("ep_3/step_0003_STOP.json")


def test_a_root_of_which_nothing_can_be_used_is_refused_even_beside_a_good_one(tmp_path):
    write_episodes(tmp_path / "good", episodes=200, steps=1)
    write_episodes(tmp_path / "bad", episodes=1, steps=1)
    (tmp_path / "bad" / "ep_0" / "milestones_result.json").unlink()
    with pytest.raises(UsageError, match=f"no usable sample under {tmp_path}/bad"):
        load_samples(Data(roots=[str(tmp_path / "good"), str(tmp_path / "bad")]), seed=0)


def damage(raw: bytes, chance: random.Random) -> bytes:
    """Cut, doubled, flipped, or with a value of another type in place of one."""
    kind = chance.randrange(4)
    where = chance.randrange(len(raw) + 1)
    if kind == 0:
        return raw[:where]
    if kind == 1:
        return raw[:where] + raw[chance.randrange(len(raw)) :]
    if kind == 2:
        return raw[:where] + bytes([chance.randrange(256)]) + raw[where + 1 :]
    values = [b"null", b"[]", b"{}", b"7", b"-1e999", b'"\\ud800"', b"true", b'"\\u0000"', b"[" * 5000]
    spots = [m.span() for m in re.finditer(rb'(?<=: )("[^"]*"|\d+|\[[^\[\]]*\]|\{[^{}]*\})', raw)]
    first, last = chance.choice(spots) if spots else (0, len(raw))
    return raw[:first] + chance.choice(values) + raw[last:]


def damage_file(raw: bytes, chance: random.Random, *, gzipped: bool) -> bytes:
    """Damage of a compressed file: of the bytes on the disk or of the content."""
    if gzipped and chance.random() < 0.7:
        return gzip.compress(damage(gzip.decompress(raw), chance), compresslevel=1)
    return damage(raw, chance)


@pytest.mark.parametrize("name", MAKERS)
def test_damaged_json_ends_as_a_listed_problem_or_a_usage_error(tmp_path, name):
    path = MAKERS[name](tmp_path / "data")
    files = [path] if path.is_file() else sorted([*path.rglob("*.json"), *path.rglob("*.json.gz")])
    whole = {file: file.read_bytes() for file in files}
    total = len(load(path).train)
    chance = random.Random(name)
    outcomes = {"listed": 0, "refused": 0, "harmless": 0}
    for _ in range(80):
        file = chance.choice(files)
        file.write_bytes(damage_file(whole[file], chance, gzipped=file.suffix == ".gz"))
        try:
            split = load(path)
        except UsageError as error:
            assert str(path) in error.message
            outcomes["refused"] += 1
        else:
            outcomes["listed" if split.problems or split.absent else "harmless"] += 1
            assert list(split.train), "what is left can be made"
            assert len(split.train) <= total * 2
        file.write_bytes(whole[file])
    assert outcomes["listed" if name in ("episodes", "jsonl") else "refused"] > 10, outcomes


def test_frames_are_ordered_by_number_in_trajectories(tmp_path):
    write_r2r(tmp_path, episodes=1, steps=2)
    write_frames(tmp_path / "0", [f"step_{i}_TURN_LEFT.png" for i in range(4, 12)])
    assert [s.frames[-1].name.split("_")[1] for s in load(tmp_path).train] == ["0", "1", *map(str, range(4, 12))]


def test_frames_that_were_cut_off_leave_the_actions_of_the_others_as_they_were(tmp_path):
    root = write_scalevln(tmp_path)
    (root / "images" / "walk_0" / "rgb" / "003.jpg").unlink()
    assert [s.action for s in load(root).train][:3] == [1, 2, 3]


@pytest.mark.parametrize("lost", ["000.jpg", "002.jpg"])
def test_a_trajectory_with_a_gap_between_its_frames_is_bad_because_actions_would_move(tmp_path, lost):
    root = write_scalevln(tmp_path)
    for name in ("000.jpg", "001.jpg") if lost == "000.jpg" else (lost,):
        (root / "images" / "walk_0" / "rgb" / name).unlink()
    split = load(root)
    assert (len(split.train), split.num_bad) == (8, 1)
    assert f"frame {int(lost[:3])} is missing in {root / 'images' / 'walk_0' / 'rgb'}" in split.describe()


def test_a_depth_image_is_no_frame(tmp_path):
    root = write_episodes(tmp_path, episodes=2)
    Image.new("I;16", (32, 24), 4000).save(root / "ep_0" / "step_0000_MOVE_FORWARD.png")
    split = load(root)
    assert len(split.train) == 4
    assert "is of mode I;16 with more than 8 bits a channel: a depth image" in split.describe()


def test_names_of_any_bytes_can_be_printed(tmp_path):
    folder = write_episodes(tmp_path, episodes=2) / "ep_0"
    (folder.rename(tmp_path / "ep_\udcff") / "step_0000_MOVE_FORWARD.json").unlink()
    reported = load(tmp_path).describe()
    assert "ep_\\udcff/step_0000_MOVE_FORWARD.json: is missing" in reported
    assert reported.encode("utf-8")


def test_records_of_one_episode_are_counted_as_one(tmp_path):
    assert "training 6 samples of 2 episodes" in load(make_json(tmp_path)).describe()


def test_frames_that_are_numbered_from_one_need_as_many_actions_as_frames(tmp_path):
    root = write_scalevln(tmp_path, episodes=2)
    for folder in (root / "images").iterdir():
        for frame in sorted((folder / "rgb").iterdir(), reverse=True):
            frame.rename(frame.with_name(f"{int(frame.stem) + 1:03d}.jpg"))
    assert [s.action for s in load(root).train][:4] == [1, 2, 3, 0]
    records = json.loads((root / "annotations.json").read_text())
    records[0]["actions"] = [-1, 1, 2, 3, 1]
    write_json(root / "annotations.json", records)
    split = load(root)
    assert (len(split.train), split.num_bad) == (4, 1), "frame 0 may as well be lost"
    assert "frame 0 is missing" in split.describe()


@pytest.mark.parametrize("suffix", ["JPG", "Png", "webp", "bmp"])
@pytest.mark.parametrize("name", ["episodes", "r2r", "scalevln"])
def test_a_frame_of_an_odd_suffix_is_listed(tmp_path, name, suffix):
    root = MAKERS[name](tmp_path)
    pattern = {"episodes": "ep_1/step_0003*.png", "r2r": "1/step_3*", "scalevln": "images/walk_1/rgb/003.jpg"}[name]
    (frame,) = root.glob(pattern)
    frame.rename(frame.with_suffix(f".{suffix}"))
    split = load(root)
    assert split.num_bad == 1
    assert f"{frame.stem}.{suffix}: has an odd suffix: frames end in .png, .jpg or .jpeg" in split.describe()


@pytest.mark.parametrize("name", ["episodes", "r2r"])
def test_a_gap_between_frames_that_name_their_actions_is_listed_and_costs_nothing_more(tmp_path, name):
    root = MAKERS[name](tmp_path)
    for file in root.glob({"episodes": "ep_1/step_0001*", "r2r": "1/step_1_*"}[name]):
        file.unlink()
    split = load(root)
    assert (len(split.train), split.num_bad) == (11, 0)
    assert " 1 is missing between " in split.describe()


def test_frames_of_an_odd_mode_are_listed_once_for_each_folder(tmp_path):
    root = write_episodes(tmp_path)
    for frame in (root / "ep_1").glob("*.png"):
        Image.open(frame).convert("RGBA").save(frame)
    split = load(root)
    assert (len(split.train), split.num_bad, len(split.problems)) == (12, 0, 1)
    assert "is of mode RGBA with transparency: shown on white (so are 3 more frames of this folder)" in split.describe()


@pytest.mark.parametrize("name", ["annotations_v1-3.json", "train_guide_en.json.gz", "val_unseen.json.gz", "x.jsonl"])
def test_a_file_of_records_of_another_name_is_named(tmp_path, name):
    standard = write_r2r(tmp_path / "data") / "train.json.gz"
    write_records(tmp_path / "data", json.loads(gzip.decompress(standard.read_bytes()))["episodes"], name)
    standard.unlink()
    write_json(tmp_path / "data" / "info.json", {"an object": "without episodes"})
    for root, shown in ((tmp_path / "data", name), (tmp_path, f"data/{name}")):
        with pytest.raises(UsageError, match=re.escape(f"there is {shown} in it: give its path")) as caught:
            load(root)
        assert f"data.roots=[{tmp_path}/data/{name}]" in str(caught.value.hint)


def test_episodes_one_folder_deeper_and_frames_without_records_are_named(tmp_path):
    write_episodes(tmp_path / "walks" / "train")
    with pytest.raises(UsageError, match="its folder train does: give its path"):
        load(tmp_path / "walks")
    (write_r2r(tmp_path / "frames") / "train.json.gz").unlink()
    (write_scalevln(tmp_path / "scalevln") / "annotations.json").unlink()
    for root in (tmp_path / "frames", tmp_path / "scalevln" / "images"):
        with pytest.raises(UsageError, match=r"holds frames .* nor a file of records") as caught:
            load(root)
        assert f"images: {root}" in str(caught.value.hint)


def test_a_sub_instruction_may_be_empty_but_not_missing(tmp_path):
    records = four_part_records(tmp_path)
    records[0]["subinstruction"] = ""
    del records[1]["subinstruction"]
    split = load(write_records(tmp_path, records))
    assert (len(split.train), split.num_bad) == (5, 1)
    assert target(split.train[0]).startswith("SUBINSTRUCTION: \n2D_DESCRIPTION: A lamp 0.\n")
    assert "record 1: subinstruction is missing or empty" in split.describe()
    records = annotation_records(tmp_path)
    answer = "SUBINSTRUCTION: \n2D_DESCRIPTION: A sofa.\n3D_DESCRIPTION: 1 m.\nACTION: STOP"
    records[0]["conversations"][1]["value"] = answer
    assert target(load(write_records(tmp_path, records)).train[0]) == answer + "<|im_end|>\n"
