"""Work for several real processes: started by torchrun as `processes.py JOB FOLDER`.

Jobs write what they found into the folder, where the tests look at it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from polyak import ModelConfig, Transformer
from polyak.errors import PolyakError, RunError
from polyak.rules import (
    Oracle,
    State,
    Stream,
    UpdateRule,
    positive,
    state_norm,
    unit_interval,
)
from polyak.training import schedules
from polyak.training.config.training import TrainingConfig
from polyak.training.dtensors import whole
from polyak.training.loss import LossModule
from polyak.training.optimizers import Optimizers, parameter_groups
from polyak.training.processes import sharded
from polyak.training.processes.distributed import (
    World,
    clip_grad_norm,
    compile_blocks,
    wrap,
)
from polyak.training.sam import perturbed, uses_sam

BATCH, LENGTH, VOCABULARY = 12, 16, 61
UNUSED_PARTS = f"{Path(__file__).resolve()}:UnusedParts"
"""How a configuration names the rule below, which no registry knows."""


class UnusedParts(UpdateRule):
    """x ← x + v + O(x); v ← LN(βv + γO(x)): the last v, its norm and scalars have no use."""

    streams = (Stream("v", start="embedding"),)
    beta, gamma = unit_interval(0.5), positive(1.0)
    norm = state_norm()

    def step(self, x: Tensor, state: State, oracle: Oracle) -> tuple[Tensor, State]:
        g = oracle(x)
        v = self.norm.combine(self.beta, state.v, self.gamma, g)
        return x + state.v + g, state.replace(v=v)


@dataclass(frozen=True)
class Case:
    """A tiny training; defaults are what the whole-system promise is about."""

    rule: str
    strategy: str = "none"
    steps: int = 20
    micro: int = 3
    clip: float = 0.05
    optimizer: str = "muon"
    sam: str = "off"
    compile: bool = False
    bfloat16: bool = False

    @property
    def name(self) -> str:
        extras = [key for key in ("compile", "bfloat16") if getattr(self, key)]
        rule = self.rule.rpartition(":")[2]  # of a rule in a file, no path
        return "-".join([rule, self.strategy, self.optimizer, self.sam, *extras])


def torchrun(
    count: int, *words: object, timeout: float = 240, check: bool = True, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run this file, or `-m MODULE …`, in `count` processes."""
    target = words if words[0] == "-m" else (__file__, *words)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", str(count)),
            *map(str, target),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1", **variables},
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert not check or done.returncode == 0, done.stderr[-3000:]
    return done


def batch_at(step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    # a skewed distribution: there is something to learn
    draws = torch.rand(BATCH, LENGTH + 1, generator=generator)
    return (draws**3 * VOCABULARY).long()


class Training:
    """What the loop does, with everything a test wants to vary."""

    def __init__(self, case: Case, world: World) -> None:
        torch.manual_seed(0)
        self.case, self.world = case, world
        self.recipe = TrainingConfig(
            steps=case.steps,
            batch_size=BATCH,
            optimizer=case.optimizer,  # type: ignore[arg-type]
            sam=case.sam,  # type: ignore[arg-type]
            clip=case.clip,
        )
        self.model = Transformer(
            ModelConfig(
                rule=case.rule,
                num_layers=2,
                num_heads=2,
                d_model=32,
                vocab_size=VOCABULARY,
                context_length=LENGTH,
            )
        )
        if case.compile:
            compile_blocks(self.model)
        loss = LossModule(self.model, "plain")
        self.loss = wrap(loss, case.strategy, world, bfloat16=case.bfloat16)
        self.optimizers = Optimizers(self.model, self.recipe)
        self.parameters = [p for group in parameter_groups(self.model).values() for p in group]

    def precision(self) -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16, enabled=self.case.bfloat16)

    def gradient(self, rows: Tensor) -> float:
        total = 0.0
        parts = torch.split(rows, self.case.micro)
        for number, part in enumerate(parts, 1):
            with self.loss.synchronised(number == len(parts)):
                with self.precision():
                    loss = self.loss(part) / (BATCH * LENGTH)
                self.loss.backward(loss)
            total += float(loss.detach())
        return self.world.sum(total)

    def step(self, step: int) -> tuple[float, float]:
        rows = batch_at(step)[self.world.rows(BATCH)]
        loss = self.gradient(rows)
        if uses_sam(step, self.recipe):
            with perturbed(self.parameters, self.recipe.sam_rho):
                self.gradient(rows)
        norm = clip_grad_norm(self.parameters, self.recipe.clip)
        self.optimizers.step(schedules.factor(step, self.recipe))
        return loss, norm

    @torch.no_grad()
    def evaluate(self) -> float:
        rows = batch_at(10**6)[self.world.rows(BATCH)]
        with self.precision():
            return self.world.sum(float(self.loss(rows))) / (BATCH * LENGTH)

    def save(self, folder: Path) -> None:
        if self.world.main:
            folder.mkdir()
        self.world.barrier()
        weights = {name: p.detach() for name, p in self.model.named_parameters()}
        sharded.save(folder, "model", weights, self.world)
        sharded.save(folder, "optimizer", self.optimizers.named_state(self.model), self.world)

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        weights = dict(self.model.named_parameters())
        for name, value in sharded.load(folder, "model", weights, self.world).items():
            weights[name].copy_(value)
        like = self.optimizers.named_state(self.model, template=True)
        state = sharded.load(folder, "optimizer", like, self.world)
        self.optimizers.load_named_state(self.model, state)


def weights_of(model: Transformer) -> dict[str, Tensor]:
    return {name: whole(parameter.detach()).cpu() for name, parameter in model.named_parameters()}


def run(case: Case, world: World) -> tuple[list[list[float]], dict[str, Tensor]]:
    """Loss and gradient norm of every step with an evaluation between, and the last weights."""
    training = Training(case, world)
    history = []
    for step in range(case.steps):
        history.append(list(training.step(step)))
        if step == case.steps // 2:
            history[-1].append(training.evaluate())
    return history, weights_of(training.model)


def train(folder: Path, world: World) -> None:
    """Every case in `cases.json`: `NAME.json` and `NAME.safetensors`."""
    for values in json.loads((folder / "cases.json").read_text()):
        case = Case(**values)
        history, weights = run(case, world)
        if world.main:
            (folder / f"{case.name}.json").write_text(json.dumps(history))
            save_file(weights, folder / f"{case.name}.safetensors")


def results(folder: Path, case: Case) -> tuple[list[list[float]], dict[str, Tensor]]:
    return (
        json.loads((folder / f"{case.name}.json").read_text()),
        load_file(folder / f"{case.name}.safetensors"),
    )


def request(folder: Path, cases: list[Case]) -> None:
    (folder / "cases.json").write_text(json.dumps([asdict(case) for case in cases]))


def resume(folder: Path, world: World) -> None:
    """For each STRATEGY:NAME in $RESUME: train six steps and save after three as NAME, or, where
    others saved that already, load it and train the remaining three."""
    for word in os.environ["RESUME"].split():
        strategy, name = word.split(":")
        training = Training(Case("triple_momentum", strategy, steps=6), world)
        target = folder / name
        found = target.exists()
        world.barrier()
        if found:
            training.load(target)
        for step in range(3 if found else 0, 6):
            if step == 3 and not found:
                training.save(target)
            training.step(step)
        weights = weights_of(training.model)
        if world.main:
            save_file(weights, folder / f"{name}-{strategy}-{world.size}.safetensors")


def places(folder: Path, world: World) -> None:
    """Tensors of every shape, saved as shards of two kinds and loaded as each other."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (world.size,))
    whole = {
        "odd": torch.arange(35.0).view(7, 5),
        "few": torch.arange(3.0).view(1, 3),  # fewer rows than processes
        "half": torch.arange(8).view(2, 2, 2).to(torch.bfloat16),
    }
    plain = {"step": torch.tensor(3.0), "random": torch.arange(9, dtype=torch.uint8)}
    by_rows = {k: distribute_tensor(t, mesh, [Shard(0)]) for k, t in whole.items()}
    by_columns = {k: distribute_tensor(t, mesh, [Shard(1)]) for k, t in whole.items()}
    zeros = {k: torch.zeros_like(t) for k, t in plain.items()}
    for name, saved, like in (("rows", by_rows, by_columns), ("columns", by_columns, by_rows)):
        if (folder / name).exists():
            continue
        sharded.save(folder, name, {**saved, **plain}, world)
        found = sharded.load(folder, name, {**like, **zeros}, world)
        for key, tensor in found.items():
            expected = {**whole, **plain}[key]
            value = tensor.full_tensor() if key in like else tensor
            assert torch.equal(value, expected), (name, key)
            assert getattr(tensor, "placements", None) == getattr(
                {**like, **zeros}[key], "placements", None
            )
    try:
        copies = {k: distribute_tensor(t, mesh, [Replicate()]) for k, t in whole.items()}
        sharded.save(folder, "copies", copies, world)
    except AssertionError:
        return
    raise SystemExit("copies were taken for shards")


def unwritable(folder: Path, world: World) -> None:
    """The shard of one process cannot be written."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (world.size,))
    tensors = {"w": distribute_tensor(torch.ones(4), mesh, [Shard(0)])}
    target = folder / f"unwritable-{world.rank}" if world.rank else folder
    try:
        sharded.save(target, "model", tensors, world)
    except RunError as error:
        (folder / f"unwritable-{world.rank}.txt").write_text(str(error))


def talk(folder: Path, world: World) -> None:
    """What the processes tell each other."""
    print(f"process {world.rank} prints")
    if world.rank == 1:
        time.sleep(0.5)
        (folder / "late").touch()
    world.barrier()
    met = (folder / "late").exists()
    with world.main_first():
        if world.main:
            time.sleep(0.5)
            (folder / "prepared").touch()
        found_prepared = (folder / "prepared").exists()
    found = {
        "main": world.main,
        "met": met,
        "prepared": found_prepared,
        "rows": [world.rows(BATCH).start, world.rows(BATCH).stop],
        "sum": world.sum(0.5 + world.rank),
        "sums": world.sums([world.rank, 1.0]),
        "order": [world.rank, world.size],
        "any": [world.any(world.rank == 1), world.any(False)],
        "broadcast": world.broadcast({"from": world.rank, "text": "β" * 5}),
        "gather": world.gather("x" * (1 + 3 * world.rank)),
    }
    try:
        world.agree(RunError("its disk is full") if world.rank == 1 else None)
    except RunError as error:
        found["agreed"] = str(error)
    (folder / f"talk-{world.rank}.json").write_text(json.dumps(found))


def fail(folder: Path, world: World) -> None:
    """One process fails in the middle of training."""
    training = Training(Case("gradient_descent", os.environ["STRATEGY"], steps=10_000), world)
    for step in range(10_000):
        if step == 3 and world.rank == int(os.environ["FAILS"]):
            raise RunError("the data of this process are gone")
        training.step(step)


def die(folder: Path, world: World) -> None:
    """One process is killed in the middle of training, as the system does when memory is out."""
    training = Training(Case("gradient_descent", "ddp", steps=10_000), world)
    for step in range(10_000):
        if step == 3 and world.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        training.step(step)


def same(folder: Path, world: World) -> None:
    """Every process finds the same mistake."""
    world.rows(7)


JOBS = {job.__name__: job for job in (train, resume, places, unwritable, talk, fail, die, same)}


def main() -> int:
    job, folder = sys.argv[1:]
    torch.set_num_threads(1)
    try:
        with World.start("cpu") as world:
            JOBS[job](Path(folder), world)
    except PolyakError as error:
        print(f"job: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
