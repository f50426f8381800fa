"""Frames: size, pixels, grid."""

from __future__ import annotations

import io
import json
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from data_files import write_episodes
from PIL import Image

from janus_cluster.errors import TrainingFailed
from janus_cluster.janusvln.data.image_check import check_image
from janus_cluster.janusvln.data.images import load_frame, load_frames
from janus_cluster.janusvln.data.index import load_samples
from janus_cluster.job.resources import vectors_dir
from janus_cluster.job.schema import Data
from janus_cluster.modelspec.frames import frame_size, qwen_grid

FIXTURE = vectors_dir() / "data_pipeline_tiny_seed0"
EXPECTED = json.loads((Path(__file__).parent / "fixtures" / "data_pipeline_tiny.json").read_text())["images"]
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


def test_a_frame_that_was_replaced_after_its_index_was_made_is_named(tmp_path):
    root = write_episodes(tmp_path / "data")
    samples = load_samples(Data(roots=[str(root)], validation_fraction=0), seed=0).train
    sample = samples[len(samples) - 1]
    assert len(sample.frame_sizes) == len(sample.frames)
    load_frames(sample.frames, CROP, sizes=sample.frame_sizes)
    Image.new("RGB", (1, 1)).save(sample.frames[-1])
    name = re.escape(sample.frames[-1].name)
    width, height = sample.frame_sizes[-1]
    with pytest.raises(TrainingFailed, match=rf"{name} is 1×1 pixels; it was {width}×{height} when") as refused:
        load_frames(sample.frames, CROP, sizes=sample.frame_sizes)
    assert refused.value.kind == "bad_data"


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
    with pytest.raises(TrainingFailed, match=r"depth\.tiff: cannot be decoded \(is of mode [IF].*: a depth image"):
        load_frame(path, Data())


def save_picture(path: Path, mode: str) -> Path:
    gradient = Image.linear_gradient("L").resize((32, 24))
    image = gradient if mode in ("I;16", "I", "F") else gradient.convert("RGB")
    alpha = gradient.point(lambda value: 255 if value > 100 else 0)
    if mode in ("RGBA", "LA"):
        image = image.convert(mode)
        image.putalpha(alpha)
        image.save(path)
    elif mode == "P with transparency":
        image.convert("P").save(path, transparency=0)
    elif mode == "RGB with transparency":
        image.save(path, transparency=image.getpixel((0, 0)))
    elif mode == "RGB, 16 bits":
        write_png_of_16_bits(path)
    else:
        image.convert(mode).save(path)
    return path


def write_png_of_16_bits(path: Path) -> None:
    """An RGB PNG of 16 bits a channel, which Pillow cannot write."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    rows = b"".join(b"\0" + bytes(range(6)) * 32 for _ in range(24))
    header = struct.pack(">IIBBBBB", 32, 24, 16, 2, 0, 0, 0)
    png = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + png)


@pytest.mark.parametrize(
    ("mode", "suffix", "remark"),
    [
        ("RGB", "png", ""),
        ("RGB", "jpg", ""),
        ("L", "png", "is of mode L: read as RGB"),
        ("L", "jpg", "is of mode L: read as RGB"),
        ("1", "png", "is of mode 1: read as RGB"),
        ("P", "png", "is of mode P: read as RGB"),
        ("RGBA", "png", "is of mode RGBA with transparency: shown on white"),
        ("LA", "png", "is of mode LA with transparency: shown on white"),
        ("P with transparency", "png", "is of mode P with transparency: shown on white"),
        ("RGB with transparency", "png", "is of mode RGB with transparency: shown on white"),
    ],
)
def test_a_frame_that_is_not_plain_rgb_is_remarked_upon_and_loads(tmp_path, mode, suffix, remark):
    path = save_picture(tmp_path / f"frame.{suffix}", mode)
    for decode in (False, True):
        facts = check_image(path, decode=decode)
        assert (facts.width, facts.height, facts.reason, facts.remark) == (32, 24, "", remark)
    pixels = load_frame(path, Data(image_width=56, min_pixels=784))
    if "transparency" in remark:
        assert pixels[:, 0, 0].tolist() == [255, 255, 255]


@pytest.mark.parametrize(
    ("mode", "suffix", "reason"),
    [
        ("CMYK", "jpg", "is of mode CMYK: save it as RGB"),
        ("I;16", "png", "is of mode I;16 with more than 8 bits a channel: a depth image"),
        ("I", "tiff", "is of mode I with more than 8 bits a channel: a depth image"),
        ("F", "tiff", "is of mode F with more than 8 bits a channel: a depth image"),
        ("RGB, 16 bits", "png", "is of mode RGB with more than 8 bits a channel: a depth image"),
        ("LAB", "tiff", "is of mode LAB: save it as RGB"),
    ],
)
def test_index_and_loading_refuse_the_same_files_for_the_same_reason(tmp_path, mode, suffix, reason):
    path = tmp_path / f"frame.{suffix}"
    if mode == "LAB":
        Image.new("LAB", (32, 24)).save(path)
    else:
        save_picture(path, mode)
    for decode in (False, True):
        assert check_image(path, decode=decode).reason.startswith(reason)
    with pytest.raises(TrainingFailed, match=re.escape(reason)):
        load_frame(path, Data())


def noisy(file_format: str) -> bytes:
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (96, 128, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, file_format)
    return buffer.getvalue()


@pytest.mark.parametrize("behind", [b"\0" * 20_000, b"x" * 20_000, b"\r\n", b"IEND\xaeB`\x82" + b"y" * 9_000])
@pytest.mark.parametrize("file_format", ["PNG", "JPEG"])
def test_bytes_behind_the_end_of_an_image_are_no_part_of_it(tmp_path, file_format, behind):
    path = tmp_path / "frame"
    path.write_bytes(noisy(file_format) + behind)
    assert [check_image(path, decode=decode).reason for decode in (False, True)] == ["", ""]
    assert load_frame(path, Data()).shape == (3, 476, 644)


@pytest.mark.parametrize("behind", [b"", b"\0" * 20_000])
@pytest.mark.parametrize("share", [0.3, 0.9, 0.999])
@pytest.mark.parametrize("file_format", ["PNG", "JPEG"])
def test_a_cut_image_is_truncated_whatever_follows(tmp_path, file_format, share, behind):
    path, whole = tmp_path / "frame", noisy(file_format)
    path.write_bytes(whole[: int(len(whole) * share)] + behind)
    assert check_image(path, decode=False).reason == "is truncated: the end of the image is missing"
    with pytest.raises(TrainingFailed, match="is truncated: the end of the image is missing"):
        load_frame(path, Data())


def test_the_end_of_a_thumbnail_is_not_the_end_of_its_jpeg(tmp_path):
    thumbnail = noisy("JPEG")
    segment = b"\xff\xe1" + struct.pack(">H", len(thumbnail) + 2) + thumbnail
    whole = noisy("JPEG")
    raw = whole[:2] + segment + whole[2:]
    path = tmp_path / "frame.jpg"
    path.write_bytes(raw + b"x" * 5_000)
    assert check_image(path, decode=False).reason == ""
    path.write_bytes(raw[: -len(whole) // 2])
    assert check_image(path, decode=False).reason == "is truncated: the end of the image is missing"


def test_equal_files_have_one_fingerprint_and_others_another(tmp_path):
    paths = [tmp_path / name for name in ("a.png", "b.png", "c.jpg")]
    for path, file_format in zip(paths, ("PNG", "PNG", "JPEG"), strict=True):
        path.write_bytes(noisy(file_format))
    first, second, third = (check_image(path, decode=False).fingerprint for path in paths)
    assert first == second != third
    assert 0 < first < 2**63
