"""What the kept measurements of a landscape study look like, in closed tables by kind."""

from __future__ import annotations

from polyak.analysis.config import SharpnessConfig
from polyak.analysis.spectrum_config import SpectrumConfig
from polyak.data.left_out import RECORD
from polyak.reading import (
    Check,
    between,
    list_of,
    named,
    number,
    one_of,
    only,
    optional,
    text,
    whole,
)
from polyak.study.sharpness import found as sharpness_found
from polyak.study.spectrum import found as spectrum_found

_VALUE = optional(between(-1e30, 1e30))
_SKIPPED = {"skipped_files": RECORD}
_WITH_ERROR = only({"value": _VALUE, "se": _VALUE})
_OVER = ("blocks", "documents")
_LOSS = only({"value": _VALUE, "se": _VALUE, "se_of": named(dict.fromkeys(_OVER, _VALUE).get)})
_SUMMARY = only(
    {
        "corpus": text(4096),
        "split": text(100),
        "fingerprint": text(64),
        **dict.fromkeys(("stride", "context_length", "tokens", *_OVER), whole(1)),
        "bytes": whole(),
        "se_over": optional(one_of(*_OVER)),
        "loss": _LOSS,
        "bits_per_byte": _WITH_ERROR,
        "perplexity": only(dict.fromkeys(("value", "se"), optional(number))),  # up to e^700
    },
    _SKIPPED,
)
_SIDES = only({"before": _SUMMARY, "after": _SUMMARY})

forgetting: Check = only(
    {
        "curve": only(dict.fromkeys(("step", "source", "target"), list_of(_VALUE))),
        **dict.fromkeys(("source", "target"), _SIDES),
        **dict.fromkeys(("forgetting", "plasticity"), optional(_WITH_ERROR)),
        "tokens_per_step": whole(1),
        "seconds": _VALUE,
    }
)
"""As `polyak.evaluation.forgetting.forget` gives it."""


def evaluate(corpora: tuple[str, ...]) -> Check:
    """Losses on each corpus by name, and the mean over the others."""
    return only({**dict.fromkeys(corpora, _SUMMARY), "others": _VALUE})


def sharpness(config: SharpnessConfig) -> Check:
    """All parts of `polyak sharpness`, and what the study takes of them."""
    part_of = sharpness_found.part_of(config)
    own = {"corpus": text(4096), **_SKIPPED}
    own |= dict.fromkeys(("top", "bottom", "rise_found"), _VALUE)
    return named(lambda name: own.get(name) or part_of(name))


def spectrum(config: SpectrumConfig) -> Check:
    """The spectra of `polyak spectrum`, and the persistence that follows from them."""
    log = spectrum_found.LOG
    maps = ("frozen", "full")
    gains = only({"layers": list_of(log, 10_000), "total": log})
    return only(
        {
            "corpus": text(4096),
            "spectra": spectrum_found.fits(config),
            "persistence_later": _VALUE,
            "persistence": only(dict.fromkeys(maps, gains)),
            "persistence_value": only(dict.fromkeys(maps, _VALUE)),
        },
        _SKIPPED,
    )
