"""torch.compile block by block: each kind of block is compiled once, whatever the number of layers."""

from __future__ import annotations

from torch import nn
from transformers.models.dinov2_with_registers.modeling_dinov2_with_registers import Dinov2WithRegistersLayer
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLDecoderLayer, Qwen2_5_VLVisionBlock

from janus_cluster.training.model.vggt import Block

COMPILED_BLOCKS = (Block, Dinov2WithRegistersLayer, Qwen2_5_VLDecoderLayer, Qwen2_5_VLVisionBlock)


def compile_blocks(module: nn.Module) -> int:
    """Every transformer block in `module` is compiled when it first runs. Returns: how many blocks."""
    blocks = [block for block in module.modules() if isinstance(block, COMPILED_BLOCKS)]
    for block in blocks:
        block.compile()
    return len(blocks)
