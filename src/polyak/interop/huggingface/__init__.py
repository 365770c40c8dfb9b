"""Polyak models as Hugging Face models; importing this registers them with the Auto classes.

    import polyak.interop.huggingface
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained("runs/mine/model")
    tokenizer = AutoTokenizer.from_pretrained("runs/mine/model")

A process that does not import polyak loads the same folder with `trust_remote_code=True`.
"""

from __future__ import annotations

from polyak.errors import MissingExtraError

try:
    import transformers as _transformers  # noqa: F401
except ModuleNotFoundError as _error:
    raise MissingExtraError(
        f"Hugging Face models need {_error.name}, which is not installed; pip install 'polyak[hf]'"
    ) from _error

from polyak.interop.huggingface.configuration import PolyakConfig
from polyak.interop.huggingface.modeling import PolyakForCausalLM, PolyakForMaskedLM
from polyak.interop.huggingface.registration import register
from polyak.interop.huggingface.sharing import push, share
from polyak.interop.huggingface.states import StateCache

__all__ = ["PolyakConfig", "PolyakForCausalLM", "PolyakForMaskedLM", "StateCache", "push", "share"]

register()
