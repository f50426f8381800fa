"""What the host learns of a batch, in one read, and what it makes of it."""

from __future__ import annotations

import pytest
import torch
from model_cases import IDS, build_reference_model, load_case

from benchmarks.counting import HostWaits
from janus_cluster.janusvln.model.janus import JanusModel
from janus_cluster.janusvln.model.layout import rope_positions

pytestmark = pytest.mark.train

# Rows of [text, image of 2×3 tokens, text, image of 1×1, text]; the second row is shorter and padded.
GRIDS = torch.tensor([[1, 4, 6], [1, 2, 2], [1, 2, 4], [1, 2, 2]])
ROWS = ([0] * 5 + [1] * 6 + [0] * 2 + [1] + [0] * 4, [1] * 2 + [0] * 3 + [1] + [0])


@pytest.fixture(scope="module")
def model() -> JanusModel:
    return build_reference_model()


def padded_rows() -> tuple[torch.Tensor, torch.Tensor]:
    """Image marks and attention mask of ROWS."""
    length = max(len(row) for row in ROWS)
    types = torch.tensor([row + [0] * (length - len(row)) for row in ROWS])
    attended = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in ROWS])
    return types, attended


def test_positions_are_those_of_transformers(model: JanusModel) -> None:
    types, attended = padded_rows()
    expected, _ = model.model.get_rope_index(types, types, image_grid_thw=GRIDS, attention_mask=attended)
    assert torch.equal(rope_positions(types, attended, GRIDS), expected)


def test_padding_in_front_is_left_out_of_the_count(model: JanusModel) -> None:
    types, attended = (x.flip(1) for x in padded_rows())
    grids = GRIDS[[1, 0, 3, 2]]
    expected, _ = model.model.get_rope_index(types, types, image_grid_thw=grids, attention_mask=attended)
    assert torch.equal(rope_positions(types, attended, grids), expected)


@pytest.mark.parametrize(
    ("grids", "message"),
    [
        (GRIDS[:3], "an image has 1 tokens"),
        (torch.cat((GRIDS, GRIDS[:1])), "fewer images"),
        (GRIDS[[1, 0, 2, 3]], "6 tokens in the text, its grid gives 1×1"),
    ],
)
def test_images_that_are_not_those_of_the_grids_are_refused(grids: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rope_positions(*padded_rows(), grids)


def test_an_image_token_without_an_embedding_is_refused(model: JanusModel) -> None:
    batch, _ = load_case("b1_3img")
    first_text = int((batch["input_ids"][0] != IDS.image_token_id).nonzero()[0])
    batch["mm_token_type_ids"][0, first_text] = 1
    with pytest.raises(ValueError, match="tokens"):
        model(**batch)


@pytest.mark.parametrize("name", ["b1_9img", "b2_3img_padded"])
def test_a_micro_step_waits_for_the_device_once(name: str, model: JanusModel) -> None:
    batch, _ = load_case(name)
    model(**batch).loss.backward()  # tables and plans of these sizes are made now
    with HostWaits() as waits:
        model(**batch).loss.backward()
    assert sum(waits.at.values()) == 1, waits.at
    assert next(iter(waits.at)).startswith("cpu at model/layout.py")


def test_a_mask_is_kept_only_where_padding_comes_first(model: JanusModel) -> None:
    batch, _ = load_case("b2_3img_padded")
    names = ("image_grid_thw", "mm_token_type_ids", "attention_mask")
    behind = model.read_layout(batch["input_ids"], **{name: batch[name] for name in names})
    assert not batch["attention_mask"].all()
    assert behind.attention_mask_BL is None
    turned = {name: batch[name].flip(1) if name != "image_grid_thw" else batch[name] for name in names}
    assert model.read_layout(batch["input_ids"].flip(1), **turned).attention_mask_BL is turned["attention_mask"]
