"""Optimizers and SAM in two processes; one start of them serves every test of this file."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.multiprocessing
from torch import Tensor, nn

from polyak import ModelConfig, Transformer
from polyak.training.config.training import TrainingConfig
from polyak.training.dtensors import is_sharded, shard_like
from polyak.training.optimizers import Optimizers
from polyak.training.sam import gradient_norm, perturbed

SIZE = {"num_layers": 2, "num_heads": 1, "d_model": 7, "vocab_size": 11, "context_length": 5}
"""Matrices of 21, 7 and 28 rows and scalars of one number: unequal shards, and empty ones."""

Tensors = dict[str, Tensor]
CASES: list[tuple[str, Any]] = [
    ("triple_momentum", "muon"),
    ("adamw", "muon"),
    ("nesterov", "adamw"),
]
SAM_CASES = [("ddp", "triple_momentum"), ("fsdp", "triple_momentum"), ("fsdp", "adamw")]


# What each process does


def process(rank: int, folder: str, weights: dict[str, Tensors], ids: Tensor) -> None:
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    results: dict[str, Any] = {}
    for rule, optimizer in CASES:
        results[f"{rule} {optimizer}"] = train_sharded(rule, optimizer, weights[rule])
    for kind, rule in SAM_CASES:
        # each process has other sequences; gradients of plain scalars are not averaged by FSDP2
        mine = ids if rule == "adamw" else ids[2 * rank : 2 * rank + 2]
        results[f"{kind} {rule}"] = sam_gradient(parallel(kind, rule, weights[rule]), mine)
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def train_sharded(rule: str, optimizer: Any, weights: Tensors) -> dict[str, Any]:
    recipe = TrainingConfig(optimizer=optimizer)
    model = parallel("fsdp", rule, weights)
    optimizers = Optimizers(model, recipe)
    assert optimizers.named_state(model) == {}
    train(model, optimizers, range(3))
    result = {"weights": whole_of(model), "state": whole_of(optimizers.named_state(model))}
    results = [result]
    # resumed from whole tensors, as any number of processes may have saved them, or from shards
    for given in (result["state"], optimizers.named_state(model)):
        again = parallel("fsdp", rule, result["weights"])
        restored = Optimizers(again, recipe)
        restored.load_named_state(again, given)
        state, template = (restored.named_state(again, template=t) for t in (False, True))
        for name, tensor in state.items():
            assert torch.equal(whole(tensor), result["state"][name]), name
            assert is_sharded(tensor) is is_sharded(template[name])
        assert any(map(is_sharded, state.values()))
        train(again, restored, range(3, 5))
        results.append({"weights": whole_of(again), "state": whole_of(restored.named_state(again))})
    return {"trained": results[0], "from whole": results[1], "from shards": results[2]}


def parallel(kind: str, rule: str, weights: Tensors) -> Any:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    model = build(rule)
    model.load_state_dict(weights)
    if kind == "ddp":
        return DistributedDataParallel(model)
    mesh = init_device_mesh("cpu", (2,))
    # FSDP2 does not shard scalars of shape (): they stay plain beside the sharded ones
    plain = {parameter for parameter in model.parameters() if parameter.ndim == 0}
    for module in (*model.blocks, model):
        fully_shard(module, mesh=mesh, ignored_params=plain)
    return model


def sam_gradient(model: nn.Module, ids: Tensor) -> dict[str, Any]:
    """Norm of the first gradient, the weights inside and the second gradient."""
    before = whole_of(model)
    backward(model, ids)
    norm = gradient_norm(model.parameters())
    with perturbed(model.parameters(), 0.05) as yielded:
        inside = whole_of(model)
        backward(model, ids)
    assert yielded == norm
    after = whole_of(model)
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"norm": norm, "inside": inside, "gradients": whole_of(gradients)}


# What both sides do


def build(rule: str) -> Transformer:
    return Transformer(ModelConfig(rule=rule, **SIZE)).double()


def backward(model: nn.Module, ids: Tensor) -> None:
    logits = model(ids[:, :-1])
    nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()


def train(model: Transformer, optimizers: Optimizers, steps: range) -> None:
    """On equal batches in every process, whose mean is that batch."""
    for step in steps:
        backward(model, torch.randint(11, (2, 6), generator=torch.Generator().manual_seed(step)))
        optimizers.step(1 / (1 + step))


def whole_of(tensors: nn.Module | Tensors) -> Tensors:
    if isinstance(tensors, nn.Module):
        tensors = tensors.state_dict()
    return {name.removeprefix("module."): whole(tensor) for name, tensor in tensors.items()}


def whole(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return (tensor.full_tensor() if is_sharded(tensor) else tensor).clone()


# The tests


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensors]:
    torch.manual_seed(0)
    found = {}
    for rule, _ in CASES:
        model = build(rule)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
        found[rule] = {name: value.detach() for name, value in model.state_dict().items()}
    return found


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(11, (4, 6), generator=torch.Generator().manual_seed(7))


@pytest.fixture(scope="module")
def found(
    tmp_path_factory: pytest.TempPathFactory, weights: dict[str, Tensors], ids: Tensor
) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.spawn(process, args=(str(folder), weights, ids), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


def assert_near(found: Tensors, expected: Tensors) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(("rule", "optimizer"), CASES)
def test_sharded_weights_train_and_resume_like_whole_ones(
    rule: str, optimizer: Any, weights: dict[str, Tensors], found: list[dict[str, Any]]
) -> None:
    model = build(rule)
    model.load_state_dict(weights[rule])
    optimizers = Optimizers(model, TrainingConfig(optimizer=optimizer))
    for steps, kinds in ((range(3), ["trained"]), (range(3, 5), ["from whole", "from shards"])):
        train(model, optimizers, steps)
        for rank in (0, 1):
            for kind in kinds:
                other = found[rank][f"{rule} {optimizer}"][kind]
                assert_near(other["weights"], whole_of(model))
                assert_near(other["state"], whole_of(optimizers.named_state(model)))


@pytest.mark.parametrize(("kind", "rule"), SAM_CASES)
def test_two_processes_take_the_sam_gradient_of_one(
    kind: str, rule: str, weights: dict[str, Tensors], found: list[dict[str, Any]], ids: Tensor
) -> None:
    model = build(rule)
    model.load_state_dict(weights[rule])
    expected = sam_gradient(model, ids)
    for rank in (0, 1):
        other = found[rank][f"{kind} {rule}"]
        assert other["norm"] == pytest.approx(expected["norm"], rel=1e-12)
        assert_near(other["inside"], expected["inside"])
        assert_near(other["gradients"], expected["gradients"])


def test_a_plain_tensor_is_its_own_shard() -> None:
    full = torch.randn(3, 2)
    assert not is_sharded(full)
    assert shard_like(full, torch.zeros(3, 2)) is full
