"""uint8 frames become exactly what Qwen's image processor would have made of them."""

from __future__ import annotations

import pytest
import torch
from transformers import Qwen2VLImageProcessorPil

from janus_cluster.janusvln.model import pixels
from janus_cluster.modelspec.frames import qwen_grid

pytestmark = pytest.mark.train


def random_frames(num_frames: int, height: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (num_frames, 3, height, width), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize(("height", "kept"), [(56, 56), (70, 56)])
def test_patches_equal_the_image_processor_on_the_top_rows(height: int, kept: int) -> None:
    frames = random_frames(3, height, 84)
    images = [frame[:, :kept].permute(1, 2, 0).numpy() for frame in frames]
    reference = Qwen2VLImageProcessorPil()(images, return_tensors="pt", do_resize=False)
    assert torch.equal(pixels.qwen_patches(frames), reference["pixel_values"])
    assert reference["image_grid_thw"].tolist() == [list(qwen_grid(84, height))] * 3


@pytest.mark.parametrize(("height", "width"), [(57, 56), (56, 70), (14, 56), (0, 28)])
def test_sizes_off_the_patch_grid_are_refused(height: int, width: int) -> None:
    with pytest.raises(ValueError, match=f"{height}x{width}"):
        qwen_grid(width, height)


def test_frames_that_are_not_uint8_are_refused() -> None:
    with pytest.raises(ValueError, match="uint8"):
        pixels.unit_frames(torch.rand(1, 3, 28, 28))


def test_groups_are_two_by_two_and_an_odd_last_row_is_dropped() -> None:
    rows, columns = torch.meshgrid(torch.arange(5), torch.arange(4), indexing="ij")
    groups = pixels.merge_groups((10 * rows + columns)[..., None])
    assert groups[..., 0].tolist() == [[0, 1, 10, 11], [2, 3, 12, 13], [20, 21, 30, 31], [22, 23, 32, 33]]


def test_groups_are_in_the_order_of_the_patches() -> None:
    """A frame whose patches hold their own number: VGGT's groups and Qwen's rows must list them alike."""
    numbers = torch.arange(16, dtype=torch.uint8).reshape(1, 1, 4, 4)
    frame = numbers.repeat_interleave(14, dim=2).repeat_interleave(14, dim=3).repeat(1, 3, 1, 1)
    red = pixels.qwen_patches(frame)[:, 0]
    order = red.argsort().argsort()
    assert order.tolist() == pixels.merge_groups(numbers[0, 0, :, :, None]).flatten().tolist()
