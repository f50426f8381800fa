"""A model that walks: its steps are those of the evaluation on the same frames, and a simulation goes on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_export import IMAGE_SIZE, SEED, Tiny, make_tiny

from janus_cluster.errors import UsageError
from janus_cluster.janusvln.data.samples import ACTIONS
from janus_cluster.janusvln.policy import EpisodeMemory, ModelPolicy
from janus_cluster.janusvln.predictions import predict_actions
from janus_cluster.janusvln.world.demo import draw_walk
from janus_cluster.janusvln.world.episodes import RoomEpisode
from janus_cluster.training.simulation import Rooms, walk_episodes

pytestmark = pytest.mark.train


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return make_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def exported(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.export(tmp_path_factory.mktemp("export"))


def policy_of(tiny: Tiny, *, max_new_tokens: int | None = None) -> ModelPolicy:
    return ModelPolicy(
        tiny.model,
        tokenizer=tiny.tokenizer,
        data=tiny.job.data,
        pad_history=False,
        four_parts=True,
        max_new_tokens=max_new_tokens,
    )


def test_the_streamed_policy_answers_as_the_evaluation_does_on_the_same_frames(tiny: Tiny) -> None:
    policy = policy_of(tiny)
    _, expected = predict_actions(
        tiny.model, tiny.dataset(tiny.samples), pad_token_id=tiny.tokenizer.pad_token_id, num_workers=0, report=print
    )
    by_frame = {Path(p.frames[-1]): p for p in expected}
    episodes = sorted(tiny.episodes.iterdir())
    walks = [draw_walk(seed=SEED, index=index, level="easy") for index in range(len(episodes))]
    memories = [EpisodeMemory(walk.instruction) for walk in walks]
    going = [RoomEpisode(walk, image_size=IMAGE_SIZE, max_steps=40) for walk in walks]
    compared = 0
    for step in range(max(len(walk.decisions) for walk in walks)):
        # Episodes of other lengths share a batch, the ended ones leave it.
        active = [i for i, walk in enumerate(walks) if step < len(walk.decisions)]
        for i in active:
            policy.see(memories[i], going[i].view())
        found = policy.action_probabilities([memories[i] for i in active])
        for i, probabilities in zip(active, found, strict=True):
            action = walks[i].decisions[step].action
            prediction = by_frame[episodes[i] / f"step_{step:04d}_{action}.png"]
            assert prediction.head_probabilities is not None
            wanted = torch.tensor([prediction.head_probabilities[name] for name in ACTIONS])
            torch.testing.assert_close(probabilities, wanted, rtol=1e-4, atol=1e-5)
            going[i].step(action)
            compared += 1
    assert compared == len(tiny.samples)


def test_walks_do_not_depend_on_how_many_are_walked_at_once(tiny: Tiny) -> None:
    rooms = Rooms(level="easy", seed=9, image_size=IMAGE_SIZE, max_steps=4)
    alone = list(walk_episodes(policy_of(tiny), rooms, [0, 1, 2], batch=1))
    together = list(walk_episodes(policy_of(tiny), rooms, [0, 1, 2], batch=2))
    assert [row.index for row in alone] == [0, 1, 2]
    assert sorted(together, key=lambda row: row.index) == alone


def test_a_model_without_a_head_answers_in_words_and_one_that_names_no_action_stops(tiny: Tiny) -> None:
    rooms = Rooms(level="easy", seed=9, image_size=IMAGE_SIZE, max_steps=4)
    (row,) = walk_episodes(policy_of(tiny, max_new_tokens=2), rooms, [0], batch=1)
    assert row.actions == ("STOP",)


def test_a_frame_of_another_size_is_refused(tiny: Tiny) -> None:
    policy, memory = policy_of(tiny), EpisodeMemory("Go.")
    policy.see(memory, torch.zeros(120, 160, 3, dtype=torch.uint8).numpy())
    with pytest.raises(UsageError, match="another size"):
        policy.see(memory, torch.zeros(160, 160, 3, dtype=torch.uint8).numpy())


def test_a_simulation_is_reported_and_one_that_was_interrupted_goes_on(exported: Path, tmp_path: Path) -> None:
    def simulate(*options: str) -> subprocess.CompletedProcess[str]:
        argv = ["simulate", str(exported), "--max-steps", "4", "--device", "cpu", "--batch", "2", *options]
        command = [sys.executable, "-m", "janus_cluster.cli", *argv]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=600)

    done = simulate("--episodes", "3", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    folder = tmp_path / "simulation"
    assert result == json.loads((folder / "simulation.json").read_text())
    assert (result["world"]["level"], result["world"]["seed"]) == ("easy", 1)
    assert result["references"]["shortest path"]["success_rate"]["mean"] >= result["scores"]["success_rate"]["mean"]
    lines = (folder / "episodes.jsonl").read_text().splitlines()
    assert sorted(json.loads(line)["index"] for line in lines) == [0, 1, 2]
    # As after a kill while the last line was written.
    (folder / "episodes.jsonl").write_text("\n".join([*lines[:2], lines[2][:20], ""]))
    done = simulate("--episodes", "3")
    assert "2 episodes are walked already" in done.stderr and "1 are left" in done.stderr
    assert "3 walks, level easy, seed 1" in done.stdout and "95 % interval" in done.stdout
    again = json.loads((folder / "simulation.json").read_text())
    assert again["scores"] == result["scores"]
    done = simulate("--episodes", "1", "--seed", "2")
    assert "walked already" not in done.stderr, "another world"
    assert len((folder / "episodes.jsonl").read_text().splitlines()) == 1
