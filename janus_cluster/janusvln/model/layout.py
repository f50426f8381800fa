"""Positions of images and labels of a batch, read by the host once: nothing later in the step waits for the device.

Shape legend: B samples, L positions, N image tokens and M labels of the batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from janus_cluster.janusvln import loss as losses
from janus_cluster.janusvln.model.pixels import MERGE_SIZE


@dataclass(frozen=True, kw_only=True)
class TextLayout:
    """Indices count positions of the flattened [B · L]; all tensors are on the batch's device.

    `attention_mask` is None where rows are padded behind their end only, or not at all: no token sees what comes after
    it, so causal attention without a mask gives every real token the same, by the fastest kernel, and nothing asks the
    device what the mask hides. What it gives the padding is never read.
    """

    position_ids_3BL: Tensor
    image_positions_N: Tensor
    label_positions_M: Tensor
    attention_mask_BL: Tensor | None


def read_layout(
    input_ids_BL: Tensor,
    *,
    is_image_BL: Tensor,
    image_grid_thw: Tensor,
    attention_mask_BL: Tensor | None = None,
    labels_BL: Tensor | None = None,
    position_ids: Tensor | None = None,
) -> TextLayout:
    """The batch's layout; label positions are those of the hidden states that predict a label, in the batch's order.

    `image_grid_thw` is on the host.
    Raises: ValueError if the text's images are not those of the grids.
    """
    device = input_ids_BL.device
    attended = torch.ones_like(input_ids_BL) if attention_mask_BL is None else attention_mask_BL
    has_label = torch.zeros_like(input_ids_BL)
    if labels_BL is not None:
        has_label[:, :-1] = losses.label_mask(labels_BL)
    types, attended, has_label = torch.stack([x.long() for x in (is_image_BL, attended, has_label)]).cpu()
    if position_ids is None:
        position_ids = rope_positions(types, attended, image_grid_thw)

    def on_device(values: Tensor) -> Tensor:
        return values.to(device, non_blocking=True)

    return TextLayout(
        position_ids_3BL=on_device(position_ids),
        image_positions_N=on_device(types.flatten().nonzero().squeeze(1)),
        label_positions_M=on_device(has_label.flatten().nonzero().squeeze(1)),
        attention_mask_BL=attention_mask_BL if bool((attended.diff(dim=1) > 0).any()) else None,
    )


def rope_positions(is_image_BL: Tensor, attended_BL: Tensor, image_grid_thw: Tensor) -> Tensor:
    """Time, row and column of every token, [3, B, L]: what transformers' get_rope_index gives, at a tenth of its time.

    Text counts on in all three. An image has one time position, and what follows it is behind its longer side. Padding
    is at 0. All on the host.
    Raises: ValueError if the text's images are not those of the grids.
    """
    positions_3BL = torch.zeros((3, *is_image_BL.shape), dtype=torch.long)
    grids = iter([(h // MERGE_SIZE, w // MERGE_SIZE) for _, h, w in image_grid_thw.tolist()])
    for row, (types, attended) in enumerate(zip(is_image_BL.tolist(), attended_BL.tolist(), strict=True)):
        kept = [number for number, counts in enumerate(attended) if counts]
        parts = list(_row_positions([types[number] for number in kept], grids))
        positions_3BL[:, row, kept] = torch.cat(parts, dim=1)
    if next(grids, None) is not None:
        raise ValueError("the text has fewer images than there are grids")
    return positions_3BL


def _row_positions(types: list[int], grids: Iterator[tuple[int, int]]) -> Iterator[Tensor]:
    """[3, n] for every run of text, and for every image."""
    start = 0
    for is_image, run in groupby(types):
        length = len(list(run))
        if not is_image:
            yield torch.arange(start, start + length).expand(3, -1)
            start += length
            continue
        rows, columns = next(grids, (0, 0))
        if rows * columns != length:
            raise ValueError(f"an image has {length} tokens in the text, its grid gives {rows}×{columns}")
        yield torch.stack(
            (
                torch.full((length,), start),
                torch.arange(start, start + rows).repeat_interleave(columns),
                torch.arange(start, start + columns).repeat(rows),
            )
        )
        start += max(rows, columns)
