"""The curvature of one trained model, ready for JSON, in parts that can be kept as they come.

The parts: `loss`, `spectrum` (both ends, and the trace), `density`, `rise`, `slices`, `scaled`,
`gauss_newton`, and `group NAME` for each parameter group.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from polyak.analysis.ascent import rises
from polyak.analysis.config import SharpnessConfig
from polyak.analysis.density import Density, density
from polyak.analysis.groups import parameter_groups
from polyak.analysis.hessian import Operator, Surface
from polyak.analysis.lanczos import Ends, extremes
from polyak.analysis.landscape import slice_1d, slice_2d
from polyak.analysis.scale import scaled, scales
from polyak.analysis.trace import trace
from polyak.errors import ConfigError
from polyak.evaluation.subjects import Subject, TokenSet
from polyak.training.machine import peak_memory_bytes

STARTS = 2
"""Top eigenvectors from which the ascent of the loss starts, in both signs."""
ASCENT_STEPS = 8
LINES, LINE_POINTS, PLANE_POINTS = 3, 21, 11
TYPICAL_PROBES = 40
"""Of one trace, for the estimate of the time left until it is known."""
Progress = Callable[[float, str], None]
"""Called with the share of the work that is done, from 0 to 1, and with what is under way."""
Found = dict[str, Any]


def sharpness_of(
    subject: Subject,
    tokens: TokenSet,
    config: SharpnessConfig,
    progress: Progress | None = None,
    *,
    found: Mapping[str, Any] | None = None,
    save: Callable[[Found], None] | None = None,
) -> Found:
    """Everything that `config` asks for about one model, ready for JSON.

    Args:
        subject: the model.
        tokens: what its loss is taken on.
        config: what is measured.
        progress: see `Progress`.
        found: parts that an earlier call with the same arguments had finished.
        save: called with all parts found so far whenever there is a new one.

    Raises:
        ConfigError: the model is not causal, not deterministic, or has dropout on.
    """
    return _Measurement(subject, tokens, config, progress, dict(found or {}), save).run()


class _Measurement:
    """One model's parts, in order; what one part needs of another is kept in memory only."""

    def __init__(
        self,
        subject: Subject,
        tokens: TokenSet,
        config: SharpnessConfig,
        progress: Progress | None,
        found: Found,
        save: Callable[[Found], None] | None,
    ) -> None:
        self.model, self.ids, self.config = subject.model, tokens.ids, config
        self.progress, self.found, self.save = progress, found, save
        self.dtype = getattr(torch, config.dtype)
        self.surface = Surface(self.model, self.ids, dtype=self.dtype)
        self.groups = parameter_groups(self.model) if config.groups else {}
        self._ends: Ends | None = None
        self._flops = _training_flops(self.model, tokens)
        # work of each part in curvature products, roughly: for the time left
        spectrum = 4.0 * config.top_k + 20 + TYPICAL_PROBES
        wanted: dict[str, tuple[float, Callable[[], Any]]] = {
            "loss": (1, self._loss),
            "spectrum": (spectrum, self._spectrum),
        }
        if config.density_probes:
            wanted["density"] = (config.density_probes * config.density_steps, self._density)
        wanted["rise"] = (len(config.radii) * (2 * STARTS + 2) * ASCENT_STEPS * 0.7, self._rise)
        if config.slice_radius:
            wanted["slices"] = ((LINES * LINE_POINTS + PLANE_POINTS**2) / 6, self._slices)
        if config.scale != "none":
            wanted["scaled"] = (spectrum, self._scaled)
        if config.gauss_newton:
            wanted["gauss_newton"] = (spectrum, self._gauss_newton)
        for group in self.groups:
            wanted[f"group {group}"] = (spectrum, partial(self._group, group))
        self.wanted = wanted
        self._before, self._now, self._part = 0.0, 0.0, ""
        self._all = sum(work for work, _ in wanted.values())

    def run(self) -> Found:
        self.surface.on_work = self._work
        for part, (work, measure) in self.wanted.items():
            self._part, self._now = part, 0.0
            if part not in self.found or self.found[part].get("status") == "partial":
                began, products = time.monotonic(), self.surface.products
                content = measure()
                content["seconds"] = time.monotonic() - began
                content.setdefault("products", self.surface.products - products)
                self._keep(part, content)
            self._before += work
        self._tell()
        return self.found

    def _keep(self, part: str, content: Found) -> None:
        self.found[part] = content
        if self.save is not None:
            self.save(self.found)

    def _work(self, share: float) -> None:
        self._now += share
        self._tell()

    def _tell(self) -> None:
        if self.progress is not None:
            work = self.wanted[self._part][0]
            share = (self._before + min(self._now, 0.98 * work)) / self._all
            self.progress(min(share, 1.0), self._part)

    def _loss(self) -> Found:
        surface = self.surface
        gradient = surface.gradient()
        return {
            "value": surface.loss(),
            "gradient_norm": float(gradient.norm()),
            "weight_norm": float(surface.weights.norm()),
            "parameters": surface.size,
            "flops_per_product": None if self._flops is None else 2 * self._flops,
        }

    def _curvature(
        self, operator: Operator, surface: Surface, *, bottom: bool = True
    ) -> tuple[Found, Ends]:
        config = self.config
        ends = self._extremes(operator, surface, bottom=bottom)
        content: Found = {
            "top": [dataclasses.asdict(pair) for pair in ends.top],
            "bottom": [dataclasses.asdict(pair) for pair in ends.bottom],
            "tolerance": ends.tolerance,
            "parameters": surface.size,
        }
        estimate = trace(
            operator,
            surface.size,
            seed=config.seed,
            vectors=ends.vectors,
            images=ends.images,
            precision=config.trace_precision,
            max_probes=config.max_probes,
            device=surface.device,
        )
        content["trace"] = estimate.to_dict()
        content["products"] = ends.products + estimate.products
        return content, ends

    def _spectrum(self) -> Found:
        content, self._ends = self._curvature(self.surface.hessian, self.surface)
        content["peak_memory_bytes"] = peak_memory_bytes()
        return content

    def _density(self) -> Found:
        before = self.found.get("density") or {}
        pairs = zip(before.get("nodes", []), before.get("weights", []), strict=True)
        done = [(np.array(nodes), np.array(weights)) for nodes, weights in pairs]
        self._now = float(len(done) * self.config.density_steps)
        while True:
            made: Density = density(
                self.surface.hessian,
                self.surface.size,
                seed=self.config.seed + 1,  # not the trace's probes
                probes=min(len(done) + 1, self.config.density_probes),
                steps=self.config.density_steps,
                device=self.surface.device,
                done=done,
            )
            done = list(zip(made.nodes, made.weights, strict=True))
            if len(done) >= self.config.density_probes:
                return made.to_dict()
            self._keep("density", {**made.to_dict(), "status": "partial"})

    def _rise(self) -> Found:
        radii = self.config.radii
        found = rises(
            self.surface,
            radii,
            directions=self._directions(),
            steps=ASCENT_STEPS,
            seed=self.config.seed,
        )
        return {"rises": [rise.to_dict() for rise in found]}

    def _directions(self) -> Tensor:
        """Top eigenvectors, again if an earlier start had found and not kept them."""
        count = min(STARTS, self.config.top_k)
        if self._ends is None:
            self._ends = self._extremes(self.surface.hessian, self.surface)
        return self._ends.vectors[:count]

    def _extremes(self, operator: Operator, surface: Surface, *, bottom: bool = True) -> Ends:
        config = self.config
        return extremes(
            operator,
            surface.size,
            count=config.top_k,
            bottom=bottom,
            tolerance=config.tolerance,
            max_products=config.max_products,
            seed=config.seed,
            device=surface.device,
        )

    def _slices(self) -> Found:
        radius, seed = self.config.slice_radius, self.config.seed
        return {
            "line": slice_1d(
                self.surface, seed=seed, radius=radius, points=LINE_POINTS, directions=LINES
            ),
            "plane": slice_2d(self.surface, seed=seed, radius=radius, points=PLANE_POINTS),
        }

    def _scaled(self) -> Found:
        assert self.config.scale != "none"
        diagonal = scales(self.surface, self.config.scale)
        content, _ = self._curvature(scaled(self.surface.hessian, diagonal), self.surface)
        return {"scale": self.config.scale, **content}

    def _gauss_newton(self) -> Found:
        content, _ = self._curvature(self.surface.gauss_newton, self.surface, bottom=False)
        self.surface.forget()
        return content

    def _group(self, group: str) -> Found:
        self.surface.forget()
        surface = Surface(self.model, self.ids, self.groups[group], dtype=self.dtype, checked=True)
        surface.on_work = self._work
        content, _ = self._curvature(surface.hessian, surface)
        return {"group": group, **content}


def _training_flops(model: nn.Module, tokens: TokenSet) -> int | None:
    """Matrix products of a loss and its gradient on these tokens; None for models of others."""
    from polyak.nn.config import ModelConfig
    from polyak.nn.cost import cost

    config = getattr(model, "config", None)
    if not isinstance(config, ModelConfig):
        return None
    try:
        return cost(config).training_flops_per_token * tokens.tokens
    except ConfigError:
        return None
