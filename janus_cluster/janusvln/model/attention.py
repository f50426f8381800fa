"""Which of torch's attention kernels the networks may take."""

from __future__ import annotations

import torch


def use_kernels_of_any_length() -> None:
    """scaled_dot_product_attention takes only kernels that are ready for every shape.

    On Hopper torch would ask cuDNN first, which builds a plan for every shape that it has not met, and keeps them all:
    about 0.4 s forward and 0.6 s backward. Nearly every micro-batch has a number of tokens of its own, and every token
    of a generated answer makes the next shape.
    Source: torch 2.13, sdp_utils.cpp and MHA.cpp; measured in modelscope/FunASR#3704 (B200, torch 2.11).
    """
    torch.backends.cuda.enable_cudnn_sdp(False)
