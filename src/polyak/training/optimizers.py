r"""Muon and AdamW in the released groups, AdamW alone, and their state by parameter name."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from polyak.errors import ConfigError, RuleError, RunError
from polyak.nn.transformer import Transformer
from polyak.rules import UpdateRule
from polyak.training.config.training import TrainingConfig
from polyak.training.dtensors import is_sharded, shard_like
from polyak.training.muon import Muon

__all__ = ["Muon", "Optimizers", "check_groups", "parameter_groups"]


def parameter_groups(model: Transformer) -> dict[str, list[nn.Parameter]]:
    """The trainable parameters by kind, each exactly once.

    `matrices`: 2-D weights of attention and MLP, and of what a rule names in `muon_parameters`.
    `embeddings`: token, position and stream tables and an untied output. `norms`: LayerNorms,
    biases, and whatever else a rule learns. `scalars`: the rules' coefficients, vectors too.

    Raises:
        RuleError: a parameter is complex, which no optimizer here takes; or a rule names one for
            Muon that is not there, or is no matrix.
    """
    own = _own_of_rules(model)
    groups: dict[str, list[nn.Parameter]] = {
        "matrices": [],
        "embeddings": [],
        "norms": [],
        "scalars": [],
    }
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if not parameter.is_floating_point():
            raise RuleError(
                f"parameter {name} is {str(parameter.dtype).removeprefix('torch.')}; the "
                "optimizers take real numbers: learn its real and imaginary parts as two parameters"
            )
        if name.endswith("_raw"):
            groups["scalars"].append(parameter)
        elif not name.startswith("blocks.") and parameter.ndim == 2:
            groups["embeddings"].append(parameter)
        elif parameter.ndim == 2 and own.get(id(parameter), True):
            groups["matrices"].append(parameter)
        else:
            groups["norms"].append(parameter)
    return groups


def _own_of_rules(model: nn.Module) -> dict[int, bool]:
    """What rules learn besides their coefficients: id → whether it is for Muon."""
    found: dict[int, bool] = {}
    for rule in model.modules():
        if not isinstance(rule, UpdateRule):
            continue
        named = dict(rule.named_parameters())
        for wanted in rule.muon_parameters:
            matrices = [
                name
                for name, parameter in named.items()
                if parameter.ndim == 2 and (name == wanted or name.startswith(f"{wanted}."))
            ]
            if not matrices:
                raise RuleError(
                    f"rule {rule.name}: muon_parameters names {wanted!r}, and it has no matrix of "
                    "that name"
                )
            found |= {id(named[name]): True for name in matrices}
        found |= {id(parameter): found.get(id(parameter), False) for parameter in named.values()}
    return found


def check_groups(model: nn.Module, groups: Iterable[tuple[str, Iterable[Tensor]]]) -> None:
    """Check that every trainable parameter of `model` is in exactly one group, once.

    Args:
        model: tied weights count once, under their first name.
        groups: pairs of a name and the parameters of that group.

    Raises:
        ConfigError: names the parameter and its groups; or a group holds a tensor that the model
            does not train.
    """
    names = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    found: dict[int, list[str]] = defaultdict(list)
    for group, parameters in groups:
        for parameter in parameters:
            if id(parameter) not in names:
                raise ConfigError(
                    f"optimizer group {group!r} holds a tensor of shape {tuple(parameter.shape)} "
                    "that is no trainable parameter of the model; build the optimizers after the "
                    "model is on its device and sharded"
                )
            found[id(parameter)].append(group)
    for identity, name in names.items():
        if len(found[identity]) != 1:
            where = " and ".join(found[identity]) or "none"
            raise ConfigError(
                f"parameter {name} must be in exactly one optimizer group, and is in: {where}"
            )


class _Slot(NamedTuple):
    """One tensor of optimizer state: whose it is and what it is called there."""

    optimizer: torch.optim.Optimizer
    parameter: nn.Parameter
    key: str

    @property
    def value(self) -> Tensor | None:
        tensor: Tensor | None = self.optimizer.state.get(self.parameter, {}).get(self.key)
        return tensor

    @property
    def shape(self) -> torch.Size:
        return torch.Size() if self.key == "step" else self.parameter.shape

    @property
    def dtype(self) -> torch.dtype:
        # fused AdamW counts steps in float32, whatever the weights are
        return torch.float32 if self.key == "step" else self.parameter.dtype

    def zeros(self) -> Tensor:
        if self.key == "step":
            return torch.zeros((), dtype=self.dtype, device=self.parameter.device)
        return torch.zeros_like(self.parameter, requires_grad=False)

    def adopt(self, tensor: Tensor) -> Tensor:
        """A copy on the parameter's device, sharded as the parameter is."""
        copy = tensor.detach().to(self.parameter.device, copy=True)
        return copy if self.key == "step" or is_sharded(copy) else shard_like(copy, self.parameter)


class Optimizers:
    """Every optimizer of a model, stepped as one, with the schedule's factor on every rate.

    `optimizer="muon"`: Muon for `matrices`; AdamW for `embeddings` with decay, and for `norms` and
    `scalars` without. `optimizer="adamw"`: one AdamW for all, with decay on `matrices` and
    `embeddings`. `scalars` have `scalar_lr`, the rest of AdamW `adam_lr` (`parameter_groups`).

    Args:
        model: the model to train: on its device, and sharded already if it will be.
        config: rates, momenta and decay.

    Attributes:
        muon: None where no parameter is Muon's.
        adam: None where no parameter is AdamW's.

    Raises:
        ConfigError: the model has no trainable parameter, or one is not in exactly one group.
        RuleError: a parameter is complex.
    """

    def __init__(self, model: Transformer, config: TrainingConfig) -> None:
        kinds = parameter_groups(model)
        matrices: list[dict[str, Any]] = []
        if config.optimizer == "muon":
            matrices.append({"params": kinds.pop("matrices"), "name": "matrices"})
        decay = {"matrices": config.weight_decay, "embeddings": config.weight_decay}
        others = [
            {
                "params": parameters,
                "name": kind,
                "lr": config.scalar_lr if kind == "scalars" else config.adam_lr,
                "weight_decay": decay.get(kind, 0.0),
            }
            for kind, found in kinds.items()
            for parameters in _apart(found)
        ]
        matrices, others = ([g for g in groups if g["params"]] for groups in (matrices, others))
        self.muon = (
            Muon(matrices, lr=config.muon_lr, momentum=config.muon_momentum) if matrices else None
        )
        self.adam = (
            torch.optim.AdamW(others, betas=config.adam_betas, fused=True) if others else None
        )
        self.all: tuple[torch.optim.Optimizer, ...] = tuple(
            optimizer for optimizer in (self.muon, self.adam) if optimizer is not None
        )
        if not self.all:
            raise ConfigError("the model has no trainable parameter; every one is frozen")
        for group in self._groups():
            group["peak"] = group["lr"]
        self._check(model)

    def step(self, factor: float) -> None:
        """Update every weight with rates at `factor` times their peak, and clear gradients."""
        for group in self._groups():
            group["lr"] = factor * group["peak"]
        for optimizer in self.all:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def rates(self) -> dict[str, float]:
        """Learning rate of the last step by group; before the first, the peaks."""
        return {group["name"]: float(group["lr"]) for group in self._groups()}

    def named_state(self, model: Transformer, *, template: bool = False) -> dict[str, Tensor]:
        """The optimizers' state, by stable names.

        `muon.<parameter>.momentum`, `adam.<parameter>.exp_avg`, `.exp_avg_sq` (each shaped like
        the parameter) and `.step` (float32 of shape ()). Before the first step it is empty; then
        it is complete, with zeros for parameters that had no gradient yet, which is what they
        would start from. Not copies; sharded parameters have sharded state (DTensor).

        Args:
            model: the one the optimizers were built with.
            template: complete also before the first step, for readers that fill tensors in place.

        Raises:
            ConfigError: the optimizers do not hold this model's parameters.
        """
        slots = dict(self._slots(model))
        if not template and all(slot.value is None for slot in slots.values()):
            return {}
        return {
            name: slot.zeros() if slot.value is None else slot.value for name, slot in slots.items()
        }

    def load_named_state(self, model: Transformer, tensors: Mapping[str, Tensor]) -> None:
        """Restore what `named_state` gave, bit for bit; the tensors are copied.

        Whole tensors are cut to this process's shards. No tensors: as before the first step.

        Raises:
            RunError: a name is missing or unexpected, or a shape or dtype differs; nothing is
                changed then.
            ConfigError: the optimizers do not hold this model's parameters.
        """
        slots = dict(self._slots(model)) if tensors else {}
        for problem, names in (
            ("has no", sorted(slots.keys() - tensors.keys())),
            ("has an unexpected", sorted(tensors.keys() - slots.keys())),
        ):
            if names:
                more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
                raise RunError(
                    f"the optimizer state {problem} {names[0]!r}{more}; it belongs to another "
                    "model or to another training.optimizer"
                )
        for name, slot in slots.items():
            given = tensors[name]
            if given.shape != slot.shape or given.dtype != slot.dtype:
                raise RunError(
                    f"the optimizer state's {name!r} is {_describe(given.shape, given.dtype)} "
                    f"where the model needs {_describe(slot.shape, slot.dtype)}"
                )
        restored = [(slot, slot.adopt(tensors[name])) for name, slot in slots.items()]
        for optimizer in self.all:
            optimizer.state.clear()
        for slot, tensor in restored:
            slot.optimizer.state[slot.parameter][slot.key] = tensor

    def _groups(self) -> Iterator[dict[str, Any]]:
        for optimizer in self.all:
            yield from optimizer.param_groups

    def _check(self, model: Transformer) -> None:
        check_groups(model, [(group["name"], group["params"]) for group in self._groups()])

    def _slots(self, model: Transformer) -> Iterator[tuple[str, _Slot]]:
        """Every tensor of a complete state, by name, in the order of the groups."""
        self._check(model)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        for optimizer in self.all:
            muon = optimizer is self.muon
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    for key in ("momentum",) if muon else ("step", "exp_avg", "exp_avg_sq"):
                        name = f"{'muon' if muon else 'adam'}.{names[id(parameter)]}.{key}"
                        yield name, _Slot(optimizer, parameter, key)


def _apart(parameters: list[nn.Parameter]) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Plain and sharded parameters, which one fused call does not take together."""
    plain = [parameter for parameter in parameters if not is_sharded(parameter)]
    kept = {id(parameter) for parameter in plain}
    return plain, [parameter for parameter in parameters if id(parameter) not in kept]


def _describe(shape: torch.Size, dtype: torch.dtype) -> str:
    return f"{str(dtype).removeprefix('torch.')} of shape {tuple(shape)}"
