"""Where things stand in a batch, known to the host after one read: nothing later in the step waits for the device.

Shape legend: B samples, L positions, N image tokens and M labels of the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from janus_cluster.training import loss as losses

Positions = Callable[..., tuple[Tensor, Any]]


@dataclass(frozen=True, kw_only=True)
class TextLayout:
    """Indices count positions of the flattened [B · L]; all tensors lie on the batch's device.

    `attention_mask` is None where no row is padded: attention then needs no mask, and nobody asks the device for one.
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
    find_positions: Positions,
    attention_mask_BL: Tensor | None = None,
    labels_BL: Tensor | None = None,
    position_ids: Tensor | None = None,
) -> TextLayout:
    """The batch's layout; label positions are those of the hidden states that predict a label, in the batch's order.

    `image_grid_thw` lies on the host; `find_positions` is transformers' get_rope_index.
    """
    device = input_ids_BL.device
    attended = torch.ones_like(input_ids_BL) if attention_mask_BL is None else attention_mask_BL
    has_label = torch.zeros_like(input_ids_BL)
    if labels_BL is not None:
        has_label[:, :-1] = losses.label_mask(labels_BL)
    types, attended, has_label = torch.stack([x.long() for x in (is_image_BL, attended, has_label)]).cpu()
    if position_ids is None:
        position_ids, _ = find_positions(types, types, image_grid_thw=image_grid_thw, attention_mask=attended)

    def on_device(values: Tensor) -> Tensor:
        return values.to(device, non_blocking=True)

    return TextLayout(
        position_ids_3BL=on_device(position_ids),
        image_positions_N=on_device(types.flatten().nonzero().squeeze(1)),
        label_positions_M=on_device(has_label.flatten().nonzero().squeeze(1)),
        attention_mask_BL=None if bool(attended.all()) else attention_mask_BL,
    )
