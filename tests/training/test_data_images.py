"""Frames: size, pixels, grid."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from janus_cluster.config.frames import frame_size, qwen_grid
from janus_cluster.config.schema import Data
from janus_cluster.errors import TrainingFailed
from janus_cluster.training.data.images import load_frame, load_frames

FIXTURE = Path(__file__).parent / "fixtures" / "data_pipeline_tiny"
EXPECTED = json.loads((FIXTURE / "expected.json").read_text())["images"]
CROP = Data()
PAD = Data(image_mode="pad")


@pytest.mark.parametrize("name", EXPECTED)
def test_padded_pixels_are_those_of_the_reference(name):
    pixels = load_frame(FIXTURE / "episodes" / name, PAD)
    assert pixels.shape == (3, 644, 644)
    for channel, row, column, value in EXPECTED[name]["probes_c_y_x_value"]:
        assert abs(int(pixels[channel, row, column]) - value) <= 1  # one grey level across Pillow versions
    assert pixels.mean() / 255 == pytest.approx(EXPECTED[name]["pad_mean"], abs=2e-3)


@pytest.mark.parametrize("name", EXPECTED)
def test_cropped_frames_have_the_size_grid_and_brightness_of_the_reference(name):
    pixels = load_frame(FIXTURE / "episodes" / name, CROP)
    assert list(pixels.shape) == EXPECTED[name]["crop_shape"]
    assert list(qwen_grid(pixels.shape[2], pixels.shape[1])) == EXPECTED[name]["crop_grid"]
    assert pixels.mean() / 255 == pytest.approx(EXPECTED[name]["crop_mean"], abs=2e-3)


def test_640_by_480_gives_35_rows_to_vggt_and_34_to_qwen():
    assert frame_size(640, 480, CROP) == (644, 490)
    assert qwen_grid(644, 490) == (1, 34, 46)


def test_max_pixels_chooses_the_widest_multiple_of_28_that_fits():
    data = Data(max_pixels=644 * 490 - 1)
    width, height = frame_size(640, 480, data)
    assert (width, height) == (616, 462)
    assert frame_size(640, 480, Data(max_pixels=644 * 490)) == (644, 490)


def test_min_pixels_chooses_the_narrowest_multiple_of_28_that_is_enough():
    assert frame_size(320, 240, Data(image_width=112, min_pixels=112 * 84)) == (112, 84)
    assert frame_size(320, 240, Data(image_width=112, min_pixels=112 * 84 + 1)) == (140, 112)


def test_max_pixels_counts_the_white_bars_too():
    assert frame_size(640, 480, Data(image_mode="pad", max_pixels=640 * 640))[0] == 616


@pytest.mark.parametrize("mode", ["crop", "pad"])
@pytest.mark.parametrize("size", [(10, 2000), (2000, 10), (3, 3)])
def test_any_frame_fits_the_smallest_limit(mode, size):
    data = Data(image_mode=mode, min_pixels=784, max_pixels=784)
    width, height = frame_size(*size, data)
    assert 28 in (width, height)
    if mode == "crop":
        assert (width, min(width, height)) == (28, 28)


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n" + b"\0" * 40])
def test_a_broken_file_is_named(tmp_path, content):
    path = tmp_path / "step_0_STOP.png"
    path.write_bytes(content)
    with pytest.raises(TrainingFailed, match=r"step_0_STOP\.png: cannot be decoded"):
        load_frame(path, CROP)


def test_a_truncated_file_is_named(tmp_path):
    path = tmp_path / "step_0_STOP.png"
    noise = np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(TrainingFailed, match=r"step_0_STOP\.png: cannot be decoded"):
        load_frame(path, CROP)


def test_frames_of_unlike_shape_are_refused_in_crop_mode_and_taken_in_pad_mode():
    wide = FIXTURE / "episodes" / "ep_10" / "step_6_MOVE_FORWARD.png"
    square = FIXTURE / "episodes" / "ep_10" / "step_8_MOVE_FORWARD.png"
    with pytest.raises(TrainingFailed, match=r"step_6_MOVE_FORWARD\.png is 644×364 .* is 644×644"):
        load_frames([wide, square], CROP)
    assert load_frames([wide, square], PAD).shape == (2, 3, 644, 644)


def test_frames_keep_their_order_and_repeats():
    paths = [FIXTURE / "episodes" / "ep_2" / f"step_{name}.png" for name in ("5_TURN_LEFT", "6_MOVE_FORWARD")]
    first, second = (load_frame(path, CROP) for path in paths)
    frames = load_frames([paths[0], paths[0], paths[1]], CROP)
    assert frames.dtype == np.uint8
    assert (frames == np.stack([first, first, second])).all()


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_a_depth_image_is_no_frame(tmp_path, mode):
    path = tmp_path / "depth.tiff"
    Image.new(mode, (32, 24), 4000).save(path)
    with pytest.raises(TrainingFailed, match=r"depth\.tiff: cannot be decoded \(mode I|F"):
        load_frame(path, Data())
