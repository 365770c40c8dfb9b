"""Making the Auto classes know polyak's."""

# mypy: disable-error-code="override,no-untyped-call,misc,unused-ignore"
# (signatures of transformers differ between its versions, and some have no types)

from __future__ import annotations

from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from polyak.interop.huggingface.configuration import PolyakConfig
from polyak.interop.huggingface.modeling import PolyakForCausalLM, PolyakForMaskedLM


def register() -> None:
    """Register configuration, models and tokenizer; a second time changes nothing."""
    AutoConfig.register(PolyakConfig.model_type, PolyakConfig, exist_ok=True)
    AutoModelForCausalLM.register(PolyakConfig, PolyakForCausalLM, exist_ok=True)
    AutoModelForMaskedLM.register(PolyakConfig, PolyakForMaskedLM, exist_ok=True)
    AutoTokenizer.register(
        PolyakConfig, fast_tokenizer_class=PreTrainedTokenizerFast, exist_ok=True
    )
