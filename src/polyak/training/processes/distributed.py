"""Training by several processes: the loss module in torch's DDP or FSDP2, one gradient for all.

Whatever the number of processes, the gradient is the sum over the global batch of what each
process gave to `backward`: with losses divided by the number of tokens in the global batch, that is
the true mean. (The released loop averages losses over processes that were divided already: with
two GPUs its gradient is half the mean.)

    none   one process
    ddp    every process has the whole model; gradients are summed during the backward pass
    fsdp   every process keeps 1/size of each weight, gradient and optimizer state; a block's
           weights are gathered when it runs
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from polyak.errors import ConfigError, unknown
from polyak.training.dtensors import is_sharded
from polyak.training.processes.world import World
from polyak.training.sam import gradient_norm

if TYPE_CHECKING:
    from polyak.training.loss import LossModule

__all__ = ["World", "Wrapped", "clip_grad_norm", "compile_blocks", "wrap"]

STRATEGIES = ("auto", "none", "ddp", "fsdp")


class Wrapped:
    """The loss module as one process: `wrapped(batch)`, then `wrapped.backward(loss)`."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, batch: Tensor) -> Tensor:
        """Summed loss of this process's batch (b, T+1)."""
        loss: Tensor = self.module(batch)
        return loss

    @contextmanager
    def synchronised(self, last: bool) -> Iterator[None]:
        """Around forward and backward of each micro-batch.

        Args:
            last: whether gradients are summed over processes; before, they are only added up
                here. After the last, every process has the whole sum.
        """
        yield

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of Σ over processes of `loss`."""
        loss.backward()  # type: ignore[no-untyped-call]


class _Copied(Wrapped):
    """DDP. It averages over processes, so what it averages is multiplied by their number."""

    def __init__(self, module: nn.Module, world: World) -> None:
        self.world = world
        self.ddp = DistributedDataParallel(
            module,
            device_ids=[world.device] if world.device.type == "cuda" else None,
            find_unused_parameters=_leaves_parameters_out(module, world.device),
        )
        super().__init__(self.ddp)

    @contextmanager
    def synchronised(self, last: bool) -> Iterator[None]:
        with nullcontext() if last else self.ddp.no_sync():
            yield

    def backward(self, loss: Tensor) -> None:
        super().backward(loss * self.world.size)


class _Sharded(Wrapped):
    """FSDP2: one group of weights for each block, one for what is around them.

    Scalars, norms and biases stay whole on every process, in float32, and their gradients are
    summed at the end: they are next to nothing beside the matrices, FSDP2 does not shard tensors
    of shape (), and norms of float32 activations want float32 weights.
    """

    def __init__(self, module: LossModule, world: World, bfloat16: bool) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        mesh = init_device_mesh(world.device.type, (world.size,))
        small = [p for p in module.parameters() if p.ndim < 2]
        with torch.no_grad():
            for parameter in module.parameters():  # as DDP does
                dist.broadcast(parameter, src=0)
        shared: dict[str, Any] = {"mesh": mesh, "ignored_params": set(small)}
        # x and the streams stay as they are between blocks: only weights are rounded
        half = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
        policy = half if bfloat16 else MixedPrecisionPolicy()
        for block in module.model.blocks:
            fully_shard(block, mp_policy=policy, **shared)
        fully_shard(module, **shared)
        self.root: Any = module  # now an FSDPModule too
        part: Any
        for part in module.modules():
            if hasattr(part, "set_gradient_divide_factor"):
                # the plain sum; gloo has no other
                part.set_gradient_divide_factor(1.0)
                part.set_force_sum_reduction_for_comms(True)
        parts = module.model.placement.parts
        if all(placed.rule.__module__.startswith("polyak.") for placed in parts):
            # said of a stream that a block passes on; our rules change nothing in place
            warnings.filterwarnings("ignore", message="FSDP2-wrapped module.*returned a view")
        self.small = [parameter for parameter in small if parameter.requires_grad]
        super().__init__(module)

    def __call__(self, batch: Tensor) -> Tensor:
        loss = super().__call__(batch)
        if not torch.is_grad_enabled():  # no backward pass follows that would do it
            self.root.reshard()
        return loss

    @contextmanager
    def synchronised(self, last: bool) -> Iterator[None]:
        self.root.set_requires_gradient_sync(last)
        yield
        if last:
            gradients = [p.grad for p in self.small if p.grad is not None]
            if gradients:
                flat = torch.cat([gradient.flatten() for gradient in gradients])
                dist.all_reduce(flat)
                parts = torch.split(flat, [gradient.numel() for gradient in gradients])
                for gradient, part in zip(gradients, parts, strict=True):
                    gradient.copy_(part.view_as(gradient))


def wrap(module: LossModule, strategy: str, world: World, *, bfloat16: bool = False) -> Wrapped:
    """The loss module as the processes share it; make optimizers afterwards.

    With `fsdp` the model's parameters become DTensors under the same names. Compile blocks before.
    With one process there is nothing to share, and every strategy is `none`.

    Args:
        module: its weights are set to the first process's.
        strategy: `none`, `ddp`, `fsdp`, or `auto`: ddp with several processes.
        world: the processes.
        bfloat16: `fsdp` gathers the blocks' matrices in bfloat16, half the traffic. Calls must
            then be under bfloat16 autocast, which rounds them anyway. Gradients are summed in
            float32.

    Raises:
        ConfigError: `none` with several processes, which would train several models.
    """
    if strategy not in STRATEGIES:
        raise unknown("parallel", strategy, STRATEGIES)
    if world.size == 1:
        return Wrapped(module)
    if strategy == "none":
        raise ConfigError(
            f"parallel='none' with {world.size} processes would train as many models; "
            "choose ddp or fsdp, or start one process"
        )
    return _Sharded(module, world, bfloat16) if strategy == "fsdp" else _Copied(module, world)


def clip_grad_norm(parameters: Iterable[nn.Parameter], limit: float) -> float:
    """Scale all gradients to a global L2 norm of at most `limit`; returns the norm before.

    The norm is over all parameters, sharded ones (DTensor) with all their shards; every process
    must call it, and gets the same number. As in torch the factor is limit/(norm + 1e-6).
    """
    parameters = list(parameters)
    if not any(is_sharded(parameter) for parameter in parameters):
        return float(torch.nn.utils.clip_grad_norm_(parameters, limit))
    norm = gradient_norm(parameters)
    factor = limit / (norm + 1e-6)
    if not factor >= 1:  # also when it is not a number, as torch does
        for parameter in parameters:
            if parameter.grad is not None:
                gradient = parameter.grad
                (gradient.to_local() if is_sharded(gradient) else gradient).mul_(factor)
    return norm


def compile_blocks(model: nn.Module) -> None:
    """Compile each block with torch.compile; names of parameters stay. Before `wrap`."""
    for block in model.blocks:  # type: ignore[union-attr]  # a ModuleList
        block.compile()


def _leaves_parameters_out(module: nn.Module, device: torch.device) -> bool:
    """Whether some trained parameter has no part in the loss, as the last step of a rule may have.

    DDP must be told, or it waits for that gradient for ever; and telling it always costs a walk
    over the graph each step. One tiny batch shows it.
    """
    training = module.training
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    with (
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        torch.compiler.set_stance("force_eager"),
    ):
        module.eval()
        loss = module(torch.zeros(1, 2, dtype=torch.int64, device=device))
        gradients = torch.autograd.grad(loss, trained, allow_unused=True)
        module.train(training)
    return any(gradient is None for gradient in gradients)
