"""Loads this model with `trust_remote_code=True`, from the package polyak.

pip install "polyak[hf]"
"""

from polyak.interop.huggingface import PolyakConfig, PolyakForCausalLM, PolyakForMaskedLM

__all__ = ["PolyakConfig", "PolyakForCausalLM", "PolyakForMaskedLM"]
