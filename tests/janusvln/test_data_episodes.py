"""Episode folders, history and the split: no torch."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from data_files import make_png

from janus_cluster.errors import UsageError
from janus_cluster.janusvln.data.history import history_positions
from janus_cluster.janusvln.data.index import load_samples
from janus_cluster.janusvln.data.prompt import render_conversation, render_target_parts
from janus_cluster.janusvln.data.split import choose_held_out
from janus_cluster.job.resources import vectors_dir
from janus_cluster.job.schema import Data

FIXTURE = vectors_dir() / "data_pipeline_tiny_seed0"
EXPECTED = json.loads((Path(__file__).parent / "fixtures" / "data_pipeline_tiny.json").read_text())
PIXELS = make_png(8, 6)
NAMES = [f"episode_{i}" for i in range(40)]


def make_episode(root: Path, name: str = "ep", *, steps: int = 3, milestones: object = None) -> Path:
    folder = root / name
    folder.mkdir(parents=True)
    default = {"instruction_text": "Go.", "subinstructions": ["Go on."], "completion_checkpoints": []}
    (folder / "milestones_result.json").write_text(json.dumps(default if milestones is None else milestones))
    for number in range(steps):
        action = "STOP" if number == steps - 1 else "MOVE_FORWARD"
        (folder / f"step_{number}_{action}.png").write_bytes(PIXELS)
        described = {"landmark_description": f"Seen {number}.", "spatial_description": f"Far {number}."}
        (folder / f"step_{number}_{action}.json").write_text(json.dumps(described))
    return folder


def reference_data(**keys: object) -> Data:
    """The reference's episodes hold frames of two sizes, which only pad mode takes, and broken files on purpose."""
    settings = {"validation_fraction": 0, "max_bad_fraction": 1, "image_mode": "pad", **keys}
    return Data(roots=[str(FIXTURE / "episodes")], **settings)


def load(root: Path, **keys: object):
    return load_samples(Data(roots=[str(root)], **{"validation_fraction": 0, "max_bad_fraction": 1, **keys}), seed=0)


@pytest.mark.parametrize("max_history", [8, 2])
def test_samples_are_those_of_the_reference(max_history):
    data = reference_data(history=max_history)
    split = load_samples(data, seed=0, pad_history=True)
    wanted = EXPECTED["samples"][str(max_history)]
    got = [(s.id, s.subinstruction, s.action, [f"{f.parent.name}/{f.name}" for f in s.frames]) for s in split.train]
    assert got == [(w["id"], w["subinstruction"], w["action"], w["frames"]) for w in wanted]


def test_every_unusable_or_odd_file_of_the_reference_is_listed():
    split = load_samples(reference_data(), seed=0)
    listed = {f"{p.path.parent.name}/{p.path.name}" for p in split.problems}
    assert listed == {
        "ep_10/milestones_result.json",
        "ep_10/step_4_MOVE_FORWARD.json",
        "ep_10/step_7_TURN_LEFT.json",
        "ep_10/step_9_MOVE_FORWARD.png",
        "ep_2/step_2_MOVE_FORWARD.png",
        "ep_2/step_8_MOVE_FORWARD.png",
        "episodes/ep_2",
        "z_without_milestones/milestones_result.json",
    }
    assert "8 problems" in split.describe()
    assert "step_7_TURN_LEFT.json: spatial_description is missing or empty" in split.describe()


@pytest.mark.parametrize(
    ("current", "max_history", "positions"),
    [
        (0, 8, (0,)),
        (8, 8, tuple(range(9))),
        (9, 8, (0, 1, 2, 3, 4, 5, 6, 7, 9)),
        (5, 2, (0, 2, 5)),
        (7, 0, (7,)),
        (7, 1, (0, 7)),
    ],
)
def test_history_ends_with_the_current_frame(current, max_history, positions):
    assert history_positions(current, max_history) == positions


def test_padding_repeats_the_first_frame_in_front():
    assert history_positions(1, 3, pad=True) == (0, 0, 0, 1)


def test_more_subinstructions_than_checkpoints_leave_the_earlier_ones_in_place(tmp_path):
    milestones = {
        "instruction_text": "Go.",
        "subinstructions": ["a", "b", "c", "d"],
        "completion_checkpoints": [{"checkpoint_frame_index": 1}],
    }
    make_episode(tmp_path, steps=4, milestones=milestones)
    split = load(tmp_path)
    assert [s.subinstruction for s in split.train] == ["a", "a", "b", "b"]
    assert "4 subinstructions but 1 checkpoints: the last 2 cover no frame" in str(split.problems[0])


@pytest.mark.parametrize(
    "lists", [{"subinstructions": [], "completion_checkpoints": []}, {}, {"subinstructions": None}]
)
def test_an_episode_without_subinstructions_is_trained_on_with_an_empty_line(tmp_path, lists):
    make_episode(tmp_path, milestones={"instruction_text": "Go.", **lists})
    split = load(tmp_path)
    assert (len(split.train), split.problems) == (3, ())
    for i, sample in enumerate(split.train):
        action = "STOP" if i == 2 else "MOVE_FORWARD"
        assert "".join(part.text for part in render_target_parts(sample)) == (
            f"SUBINSTRUCTION: \n2D_DESCRIPTION: Seen {i}.\n3D_DESCRIPTION: Far {i}.\nACTION: {action}<|im_end|>\n"
        )
        assert "SUBINSTRUCTION: ..." in render_conversation(sample)[-1], "asked for as of any other episode"


def test_steps_are_ordered_by_number_not_by_name(tmp_path):
    make_episode(tmp_path, steps=12)
    assert [s.id for s in load(tmp_path).train][:3] == [f"ep/step_{i}_MOVE_FORWARD.png" for i in range(3)]
    assert load(tmp_path).train[-1].id == "ep/step_11_STOP.png"


def test_a_frame_without_descriptions_stays_in_the_history(tmp_path):
    (make_episode(tmp_path) / "step_1_MOVE_FORWARD.json").unlink()
    split = load(tmp_path)
    assert [s.id for s in split.train] == ["ep/step_0_MOVE_FORWARD.png", "ep/step_2_STOP.png"]
    assert [f.name for f in split.train[1].frames][1] == "step_1_MOVE_FORWARD.png"


def test_two_files_of_one_step_drop_the_episode_and_name_both(tmp_path):
    make_episode(tmp_path, "good")
    (make_episode(tmp_path, "twice") / "step_1_TURN_LEFT.jpg").write_bytes(PIXELS)
    split = load(tmp_path)
    assert {s.episode for s in split.train} == {"good"}
    assert "step_1_MOVE_FORWARD.png and step_1_TURN_LEFT.jpg are both step 1" in str(split.problems[0])


def test_an_unknown_action_is_a_problem_and_no_sample(tmp_path):
    folder = make_episode(tmp_path)
    for suffix in ("png", "json"):
        (folder / f"step_1_MOVE_FORWARD.{suffix}").rename(folder / f"step_1_JUMP.{suffix}")
    split = load(tmp_path)
    assert len(split.train) == 2
    assert "unknown action JUMP, expected one of STOP, MOVE_FORWARD, TURN_LEFT, TURN_RIGHT" in str(split.problems[0])


@pytest.mark.parametrize("where", ["instruction", "description"])
def test_control_tokens_in_the_text_are_refused(tmp_path, where):
    text = "Go <|image_pad|> on."
    milestones = {"instruction_text": text if where == "instruction" else "Go.", "subinstructions": ["Go on."]}
    folder = make_episode(tmp_path, "bad", milestones=milestones)
    make_episode(tmp_path, "good")
    if where == "description":
        described = {"landmark_description": text, "spatial_description": "Far."}
        (folder / "step_0_MOVE_FORWARD.json").write_text(json.dumps(described))
    split = load(tmp_path)
    assert len(split.train) == (3 if where == "instruction" else 5)
    assert "holds the control token <|image_pad|>" in split.describe()


@pytest.mark.parametrize(
    ("milestones", "reason"),
    [
        ([], "holds a list, expected an object"),
        ({"subinstructions": ["a"]}, "instruction_text is missing or empty"),
        ({"instruction_text": "Go.", "subinstructions": [""]}, "subinstructions must be a list of texts"),
        ({"instruction_text": "Go.", "subinstructions": "Go on."}, "subinstructions must be a list of texts"),
    ],
)
def test_nothing_usable_is_a_usage_error_that_names_the_file(tmp_path, milestones, reason):
    make_episode(tmp_path, milestones=milestones)
    with pytest.raises(UsageError) as caught:
        load(tmp_path)
    assert f"{tmp_path}/ep/milestones_result.json: {reason}" in caught.value.message
    assert caught.value.hint is not None


def test_broken_json_names_the_file(tmp_path):
    (make_episode(tmp_path) / "milestones_result.json").write_text("{")
    with pytest.raises(UsageError, match=r"ep/milestones_result\.json: cannot be read as JSON"):
        load(tmp_path)


def test_roots_that_are_wrong_are_named(tmp_path):
    with pytest.raises(UsageError, match="nowhere does not exist"):
        load(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="is an episode, expected a folder of episodes") as caught:
        load(make_episode(tmp_path))
    assert str(tmp_path) in str(caught.value.hint)
    with pytest.raises(UsageError, match=r"data\.roots is empty"):
        load_samples(Data(), seed=0)


def test_several_roots_are_read_in_their_order(tmp_path):
    make_episode(tmp_path / "b", "one")
    make_episode(tmp_path / "a", "two")
    data = Data(roots=[str(tmp_path / "b"), str(tmp_path / "a")], validation_fraction=0)
    assert [s.episode for s in load_samples(data, seed=0).train] == ["one"] * 3 + ["two"] * 3


def test_the_split_depends_on_names_and_seed_only():
    chosen = choose_held_out(NAMES, fraction=0.25, seed=1)
    assert len(chosen) == 10
    assert chosen == choose_held_out(reversed(NAMES), fraction=0.25, seed=1)
    assert chosen != choose_held_out(NAMES, fraction=0.25, seed=2)
    grown = choose_held_out([*NAMES, "new"], fraction=0.25, seed=1)
    assert len(chosen - grown) <= 1


@pytest.mark.parametrize(("fraction", "count", "held_out"), [(0, 9, 0), (0.01, 9, 1), (0.99, 2, 1), (0.5, 1, 0)])
def test_both_sides_of_the_split_hold_an_episode_where_they_can(fraction, count, held_out):
    assert len(choose_held_out(NAMES[:count], fraction=fraction, seed=0)) == held_out


def test_no_episode_is_on_both_sides():
    split = load_samples(reference_data(validation_fraction=0.5), seed=0)
    assert {s.episode for s in split.train} and {s.episode for s in split.held_out}
    assert not {s.episode for s in split.train} & {s.episode for s in split.held_out}


def test_index_prompt_images_and_demo_import_without_torch():
    code = (
        "import sys\n"
        "for name in ('torch', 'transformers', 'tokenizers', 'deepspeed'): sys.modules[name] = None\n"
        "import janus_cluster.janusvln.data.index, janus_cluster.janusvln.data.prompt\n"
        "import janus_cluster.janusvln.data.images, janus_cluster.janusvln.world.demo\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=600)


def test_a_hidden_folder_is_no_episode(tmp_path):
    make_episode(tmp_path)
    shutil.copytree(tmp_path / "ep", tmp_path / ".ep.building")
    assert {s.episode for s in load(tmp_path).train} == {"ep"}
