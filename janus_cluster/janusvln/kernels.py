"""What of DeepSpeed's own C++ is compiled before training: nothing that training does not call."""

from __future__ import annotations

import deepspeed.ops


def skip_unused_kernels() -> None:
    """DeepSpeed no longer compiles its shared-memory all-reduce on cpu: only inference calls it.

    Otherwise the first process group takes g++ and a minute or more of two processors, on every node.
    """
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
