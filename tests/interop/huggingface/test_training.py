"""Labels, gradients and Trainer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from polyak import rules

IDS = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, 9, 0]])


@pytest.mark.parametrize("rule", rules.names())
def test_the_loss_is_that_of_the_next_token_and_leaves_out_minus_100(
    tiny: Callable[..., Any], rule: str
) -> None:
    model = tiny(rule)
    labels = IDS.clone()
    labels[0, :2] = -100
    labels[1, 4] = -100
    output = model(IDS, labels=labels)
    kept = labels[:, 1:] != -100
    terms = F.cross_entropy(output.logits[:, :-1][kept], labels[:, 1:][kept], reduction="none")
    assert torch.allclose(output.loss, terms.mean())
    for items in (3, torch.tensor(3)):  # as Trainer passes it when it accumulates
        assert torch.allclose(
            model(IDS, labels=labels, num_items_in_batch=items).loss, terms.sum() / 3
        )
    loss, logits = model(IDS, labels=labels, return_dict=False)[:2]
    assert torch.equal(loss, output.loss)
    assert torch.equal(logits, output.logits)


def test_an_encoders_labels_are_not_shifted(tiny: Callable[..., Any]) -> None:
    model = tiny(causal=False)
    labels = torch.full_like(IDS, -100)
    labels[0, 2], labels[1, 4] = 3, 0
    output = model(IDS, labels=labels)
    wanted = F.cross_entropy(output.logits[[0, 1], [2, 4]], torch.tensor([3, 0]))
    assert torch.allclose(output.loss, wanted)


def gradients(model: Any) -> dict[str, torch.Tensor]:
    model.zero_grad()
    torch.manual_seed(5)
    model(IDS, labels=IDS).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("rule", rules.names())
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")
def test_gradient_checkpointing_changes_no_gradient_and_keeps_less(
    tiny: Callable[..., Any], rule: str
) -> None:
    model = tiny(rule, dropout=0.1).train()
    plain = gradients(model)
    kept = saved_bytes(model)
    for options in (None, {"use_reentrant": True}):
        model.gradient_checkpointing_enable(options)
        assert model.gradient_checkpointing
        assert saved_bytes(model) < kept
        again = gradients(model)
        assert plain.keys() == again.keys()
        for name, gradient in plain.items():
            assert torch.equal(gradient, again[name]), name
    model.gradient_checkpointing_disable()
    assert saved_bytes(model) == kept


def saved_bytes(model: Any) -> int:
    """Bytes that the graph of a forward pass holds."""
    held: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(IDS, labels=IDS).loss
    assert loss.requires_grad
    return sum(held.values())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")
def test_trainer_fine_tunes_a_run(run: Path, tmp_path: Path, checkpointing: bool) -> None:
    pytest.importorskip("accelerate", reason="Trainer needs it")
    from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

    model = AutoModelForCausalLM.from_pretrained(run / "model")
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    texts = ["deep water runs", "still water", "water"] * 8
    data = [{"input_ids": ids} for ids in tokenizer(texts)["input_ids"]]
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(tmp_path / "out"),
            max_steps=6,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            learning_rate=1e-2,
            gradient_checkpointing=checkpointing,
            logging_steps=1,
            save_steps=3,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=data,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        processing_class=tokenizer,
    )
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert len(losses) == 6
    assert losses[-1] < losses[0] - 0.5
    trainer.save_model(str(tmp_path / "tuned"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned")
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name]), name
    assert (tmp_path / "tuned" / "modeling_polyak.py").exists()
    assert AutoTokenizer.from_pretrained(tmp_path / "tuned").decode([104, 105]) == "hi"
    middle = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "checkpoint-3")
    assert not torch.equal(middle.norm.weight, again.norm.weight)
