"""One frame at a time: the features of one pass while everything is kept, bounded memory afterwards."""

from __future__ import annotations

import pytest
import torch
from model_cases import build_reference_model, load_case, worst
from torch.nn import functional as F

from janus_cluster.janusvln.model import pixels
from janus_cluster.janusvln.model.streaming import FIRST_FRAMES, RECENT_FRAMES, StreamingMemory
from janus_cluster.janusvln.model.vggt import Aggregator
from janus_cluster.modelspec.networks import VggtConfig

pytestmark = pytest.mark.train

FIRST, RECENT = 2, 3
WINDOW = FIRST + RECENT + 1


@pytest.fixture(scope="module")
def aggregator() -> Aggregator:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        built = Aggregator(VggtConfig(embed_dim=32, depth=4, num_heads=2, dino_depth=1, dino_num_heads=2))
        for parameter in built.parameters():
            parameter.copy_(parameter + 0.05 * torch.randn_like(parameter))
        return built


@pytest.fixture(scope="module")
def frames() -> torch.Tensor:
    return torch.rand(14, 3, 28, 42, generator=torch.Generator().manual_seed(1))


def windowed_pass(aggregator: Aggregator, frames: torch.Tensor) -> torch.Tensor:
    """All frames at once with a mask of the frames that each may see: the same thing, written another way."""
    rope = aggregator.rope_table(2, 3)
    x = aggregator.with_special_tokens(aggregator.patch_tokens(frames))
    num_frames, num_tokens = x.shape[:2]
    index = torch.arange(num_frames)
    query, key = index[:, None], index[None]
    seen = (key <= query) & ((key < FIRST) | (key >= query - RECENT))
    mask = seen.repeat_interleave(num_tokens, 0).repeat_interleave(num_tokens, 1)
    with torch.no_grad():
        for frame_block, global_block in zip(aggregator.frame_blocks, aggregator.global_blocks, strict=True):
            in_frame = frame_block(x, rope)
            flat = [
                t.transpose(0, 1).flatten(1, 2)[None]
                for t in global_block.attn.project(global_block.norm1(in_frame), rope)
            ]
            mixed = F.scaled_dot_product_attention(*flat, attn_mask=mask)[0].unflatten(1, (num_frames, num_tokens))
            x = global_block.add_to_stream(in_frame, mixed.transpose(0, 1))
    return aggregator.feature_map(in_frame[-1], x[-1], grid_h=2, grid_w=3)


def test_the_kept_frames_are_the_papers() -> None:
    assert (FIRST_FRAMES, RECENT_FRAMES) == (8, 48)


def test_while_all_frames_are_kept_each_step_is_one_pass_over_them(
    aggregator: Aggregator, frames: torch.Tensor
) -> None:
    memory = StreamingMemory(aggregator, first=FIRST, recent=RECENT)
    for i in range(WINDOW):
        assert worst(memory.append(frames[i]), aggregator(frames[: i + 1])) < 1e-5
    assert worst(memory.append(frames[WINDOW]), aggregator(frames[: WINDOW + 1])) > 1e-4


def test_afterwards_a_frame_sees_the_first_and_the_most_recent_ones_only(
    aggregator: Aggregator, frames: torch.Tensor
) -> None:
    memory = StreamingMemory(aggregator, first=FIRST, recent=RECENT)
    sizes = []
    for i in range(len(frames)):
        assert worst(memory.append(frames[i]), windowed_pass(aggregator, frames[: i + 1])) < 1e-5
        sizes.append(memory.num_bytes)
    tokens, blocks = 2 * 3 + 5, 3
    assert sizes[WINDOW - 1 :] == [WINDOW * tokens * blocks * 2 * 32 * 4] * (len(frames) - WINDOW + 1)
    assert sizes[0] < sizes[-1]


def test_a_reset_memory_is_a_new_one(aggregator: Aggregator, frames: torch.Tensor) -> None:
    memory = StreamingMemory(aggregator)
    first = memory.append(frames[0])
    memory.append(frames[1])
    with pytest.raises(ValueError, match="reset"):
        memory.append(torch.rand(3, 56, 56))
    memory.reset()
    assert memory.num_bytes == 0
    assert torch.equal(memory.append(frames[0]), first)


def test_no_window_at_all_leaves_each_frame_to_itself(aggregator: Aggregator, frames: torch.Tensor) -> None:
    memory = StreamingMemory(aggregator, first=0, recent=0)
    memory.append(frames[0])
    again = memory.append(frames[1])
    assert torch.equal(memory.append(frames[1]), again)
    with pytest.raises(ValueError, match="negative"):
        StreamingMemory(aggregator, recent=-1)


def test_the_model_takes_a_streamed_memory_in_place_of_its_own() -> None:
    model = build_reference_model()
    batch, expected = load_case("b1_3img")
    memory = StreamingMemory(model.vggt)
    for frame in pixels.unit_frames(batch["frames"][0]):
        features = memory.append(frame)
    with torch.no_grad():
        streamed = model(**batch, memories=[pixels.merge_groups(features)])
        other = model(**batch, memories=[pixels.merge_groups(features.flip(0))])
    assert worst(streamed.loss, expected["out.loss_total"]) < 1e-5
    assert worst(other.loss, expected["out.loss_total"]) > 1e-5
