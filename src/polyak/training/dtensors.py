"""Tensors that FSDP2 has sharded (DTensor), beside plain ones."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, TypeGuard

from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_sharded(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether it is a DTensor, as FSDP2 makes of parameters; never imports that module itself."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def shard_like(full: Tensor, parameter: Tensor) -> Tensor:
    """The part of a whole tensor that this process keeps of `parameter`; plain stays plain.

    Every process must hold the same `full`; nothing is communicated.
    """
    if is_sharded(parameter):
        from torch.distributed.tensor import distribute_tensor

        mesh, placements = parameter.device_mesh, parameter.placements
        return distribute_tensor(full, mesh, placements, src_data_rank=None)
    return full


def whole(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor, gathered by all processes together; plain stays plain."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor
