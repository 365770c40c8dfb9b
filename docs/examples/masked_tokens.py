"""Encoders that fill in masked bytes of Python's own sources: `python masked_tokens.py [STEPS]`."""

import sys

import numpy as np
import torch
import torch.nn.functional as F

from polyak import ModelConfig, Transformer
from polyak.data.prepare import prepare

MASK, PADDING, LENGTH, BATCH = 256, 257, 64, 32  # bytes are 0 to 255


def lines(tokens, limit):
    """Lines of 16 to 64 bytes as rows (N, 64), padded on the right."""
    text = np.asarray(tokens[:limit])
    rows = [row for row in np.split(text, np.flatnonzero(text == 10)) if 16 <= len(row) <= LENGTH]
    padded = np.full((len(rows), LENGTH), PADDING)
    for place, row in zip(padded, rows, strict=True):
        place[: len(row)] = row
    return torch.from_numpy(padded).long()


def loss(model, rows, generator):
    """Mean cross-entropy in nats of masked bytes, 15% of all."""
    real = rows != PADDING
    hidden = real & (torch.rand(rows.shape, generator=generator) < 0.15)
    logits = model(rows.masked_fill(hidden, MASK), attention_mask=real)
    return F.cross_entropy(logits[hidden], rows[hidden])


def train(rule, training, held_out, steps):
    """The held-out loss of a small encoder after so many steps."""
    torch.manual_seed(0)
    draws = torch.Generator().manual_seed(0)  # the same batches and masks for every rule
    model = Transformer(
        ModelConfig(rule=rule, causal=False, d_model=96, vocab_size=258, context_length=LENGTH)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps + 1)
    for _ in range(steps):
        rows = training[torch.randint(len(training), (BATCH,), generator=draws)]
        optimizer.zero_grad()
        loss(model, rows, draws).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()
    masks = torch.Generator().manual_seed(1)
    with torch.no_grad():
        return torch.stack([loss(model, part, masks) for part in held_out.split(64)]).mean().item()


steps = int(sys.argv[1]) if len(sys.argv) > 1 else 250
data = prepare("stdlib")
training, held_out = lines(data.train, 2_000_000), lines(data.validation, 60_000)
counts = torch.bincount(training[training != PADDING], minlength=256) + 1
frequencies = (counts / counts.sum()).log()
print(f"masked bytes of {len(held_out)} lines not trained on, nats each, after {steps} steps")
print(f"{'byte frequencies':20} {-frequencies[held_out[held_out != PADDING]].mean():.3f}")
for rule in ("gradient_descent", "triple_momentum"):
    print(f"{rule:20} {train(rule, training, held_out, steps):.3f}", flush=True)
