"""torch.compile block by block: each kind of block is compiled once, whatever the number of layers."""

from __future__ import annotations

from torch import nn
from torch._dynamo import config as dynamo
from transformers.models.dinov2_with_registers.modeling_dinov2_with_registers import Dinov2WithRegistersLayer
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLDecoderLayer, Qwen2_5_VLVisionBlock

from janus_cluster.janusvln.model.vggt import Block

# All blocks of a kind share one code object, and torch counts its versions (frames, grid, gradients, padding) together.
# Past the limit, 8 by default, it would go on without compiling and only warn.
RECOMPILE_LIMIT = 128

COMPILED_BLOCKS = (Block, Dinov2WithRegistersLayer, Qwen2_5_VLDecoderLayer, Qwen2_5_VLVisionBlock)


def compile_blocks(module: nn.Module) -> int:
    """Every transformer block in `module` is compiled when it first runs, and none goes on uncompiled without an error.

    Returns: how many blocks.
    """
    dynamo.recompile_limit = RECOMPILE_LIMIT
    dynamo.fail_on_recompile_limit_hit = True
    blocks = [block for block in module.modules() if isinstance(block, COMPILED_BLOCKS)]
    for block in blocks:
        block.compile()
    return len(blocks)
