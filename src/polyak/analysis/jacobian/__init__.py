r"""Jacobians of a model's blocks, and singular values of them and of their products.

    for maps in block_maps(model, ids):
        spectrum(maps.frozen)      # (a) x → x, auxiliary streams frozen, as published
        spectrum(maps.full)        # (b) x and all streams
        spectrum(maps.oracle)      # (c) R(x) = A(LN x) + M(LN(x + A(LN x)))
    spectrum(product([maps.frozen for maps in ...], "product of (a)"))

docs/analysis-spectrum.md has the definitions and derivations.
"""

from polyak.analysis.estimates import Estimate, persistence
from polyak.analysis.jacobian.maps import BlockMaps, Map, block_maps, product
from polyak.analysis.jacobian.quantiles import Quantile
from polyak.analysis.jacobian.spectra import Options, Spectrum, spectrum

__all__ = [
    "BlockMaps",
    "Estimate",
    "Map",
    "Options",
    "Quantile",
    "Spectrum",
    "block_maps",
    "persistence",
    "product",
    "spectrum",
]
