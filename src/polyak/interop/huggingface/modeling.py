"""`PolyakForCausalLM` and `PolyakForMaskedLM`: what `AutoModelFor…` makes of a polyak model."""

# mypy: disable-error-code="override,no-untyped-call,misc,unused-ignore"
# (signatures of transformers differ between its versions, and some have no types)

from __future__ import annotations

import inspect
import warnings
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationMixin, StoppingCriteria, StoppingCriteriaList
from transformers.modeling_outputs import CausalLMOutputWithPast, MaskedLMOutput

from polyak.errors import ConfigError
from polyak.interop.huggingface.base import PolyakPreTrainedModel
from polyak.interop.huggingface.states import StateCache


class _LanguageModel(PolyakPreTrainedModel):
    """What a decoder and an encoder have in common: tokens in, logits and a loss out."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: int | Tensor | None = None,
    ) -> Any:
        """Logits (B, T, vocab) and, with labels, the loss: see the class.

        Args:
            input_ids: tokens (B, T); with a cache, those after the cached ones.
            attention_mask: (B, S), 1 for real tokens, 0 for padding on either side; S counts
                cached tokens.
            position_ids: (B, T); default 0, 1, … from the first real token.
            past_key_values: a cache of transformers (where attention remembers a state: a
                `StateCache`); encoders have none.
            inputs_embeds: refused; streams have tables of their own.
            labels: (B, T), not shifted; -100 is left out.
            use_cache: return a cache to go on with; by default a decoder does when not training.
            output_attentions: refused.
            output_hidden_states: also return x before the first block, after each, and, last,
                after the final norm.
            return_dict: a named output; otherwise a tuple.
            logits_to_keep: only for the last so many positions, or those of a tensor; 0 for all.
            num_items_in_batch: what to divide the summed loss by, as Trainer says when it
                accumulates gradients.

        Raises:
            ConfigError: the sequence is longer than the context, or an argument does not fit.
        """
        if labels is not None and not (isinstance(logits_to_keep, int) and logits_to_keep == 0):
            raise ConfigError("logits_to_keep: labels need all logits; leave one of the two out")
        if use_cache is None:
            use_cache = self._causal and self.config.use_cache and not self.training
            use_cache = use_cache and labels is None and not self.transformer.sees_length
        if use_cache and past_key_values is None:
            past_key_values = StateCache() if self.transformer.recurrent else DynamicCache()
        hidden, named = self._choices(output_hidden_states, return_dict)
        logits, states = self._logits(
            input_ids,
            inputs_embeds,
            output_attentions,
            hidden,
            logits_to_keep,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=past_key_values
            if self.transformer.recurrent
            else _told_where(past_key_values, input_ids),
        )
        loss = None
        if labels is not None:
            scale = {} if num_items_in_batch is None else {"num_items_in_batch": num_items_in_batch}
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **scale)
        cache = {"past_key_values": past_key_values if use_cache else None} if self._causal else {}
        kind = CausalLMOutputWithPast if self._causal else MaskedLMOutput
        output = kind(loss=loss, logits=logits, hidden_states=states, **cache)
        return output if named else output.to_tuple()


class PolyakForCausalLM(_LanguageModel, GenerationMixin):
    """A language model whose layers are optimizer steps; the loss is the next token's."""

    _causal = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._is_stateful = self.transformer.recurrent  # drafts cannot be taken back then

    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: Any = None,
        logits_processor: Any = None,
        stopping_criteria: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Generate as everywhere in transformers; where the context ends, it stops and warns.

        Where attention remembers a state, and positions are no table, there is no such end.

        Raises:
            ConfigError: the prompt alone is longer than the context.
        """
        longest = self.transformer.longest
        ends = [] if longest is None else [_ContextEnd(longest)]
        return super().generate(
            inputs,
            generation_config,
            logits_processor,
            StoppingCriteriaList([*(stopping_criteria or ()), *ends]),
            *args,
            **kwargs,
        )

    def _prepare_generated_length(
        self, generation_config: Any, *args: Any, input_ids_length: int, **kwargs: Any
    ) -> Any:
        """Up to the context's end at most: assistants would draft beyond it."""
        found: Any = super()._prepare_generated_length(
            generation_config, *args, input_ids_length=input_ids_length, **kwargs
        )
        longest = self.transformer.longest
        # a longer prompt is refused when it is read
        if longest is not None and input_ids_length <= longest:
            found.max_length = min(found.max_length, longest + 1)
        return found

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """States instead of keys and values, where that is what attention remembers."""
        given = model_kwargs.get("past_key_values") is not None
        if given or generation_config.use_cache is False or not self.transformer.recurrent:
            return super()._prepare_cache_for_generation(
                generation_config, model_kwargs, *args, **kwargs
            )
        kind = generation_config.cache_implementation
        if kind not in (None, "dynamic", "static"):  # what has a constant size is both
            raise ConfigError(
                f"cache_implementation={kind!r} is for keys and values, and this model's attention "
                "remembers a state of constant size; leave it out"
            )
        model_kwargs["past_key_values"] = StateCache()
        return None

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache_position: Tensor | None = None,
        use_cache: bool | None = None,
        is_first_iteration: bool | None = None,
        inputs_embeds: Tensor | None = None,
        logits_to_keep: int | Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        **_: Any,
    ) -> dict[str, Any]:
        """Arguments of `forward` for the tokens that are not cached yet.

        The mask stays (B, S), whatever the cache: attention makes its own from it. What else
        `generate` hands over is its own, such as the tokenizer that stop strings need; it has
        refused arguments that are not named here.
        """
        length = next_sequence_length
        if length is None and cache_position is not None:  # transformers 4
            length = len(cache_position)
        if length is not None:
            input_ids = input_ids[:, -length:] if length else input_ids[:, :0]
        inputs: dict[str, Any] = {
            "input_ids": input_ids.contiguous(),
            "attention_mask": attention_mask,
            "past_key_values": past_key_values,
            "use_cache": use_cache,
            "inputs_embeds": inputs_embeds,
            "output_attentions": output_attentions,
            "output_hidden_states": output_hidden_states,
        }
        if position_ids is not None:
            inputs["position_ids"] = position_ids[:, -input_ids.shape[1] :]
        if logits_to_keep is not None:
            inputs["logits_to_keep"] = logits_to_keep
        return inputs


class PolyakForMaskedLM(_LanguageModel):
    """An encoder (`causal=False`) whose layers are optimizer steps; the loss is of the labels."""

    _causal = False


class _Told:
    """A cache of transformers 4, whose static kinds must be told where to write."""

    def __init__(self, cache: Any, positions: Tensor) -> None:
        self.cache, self.positions = cache, positions

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int) -> Any:
        """See `polyak.nn.cache.Cache`."""
        where = {"cache_position": self.positions}
        return self.cache.update(key_states, value_states, layer_idx, where)

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        """See `polyak.nn.cache.Cache`."""
        return self.cache.get_seq_length(layer_idx)


def _told_where(cache: Any, input_ids: Tensor | None) -> Any:
    update = getattr(cache, "update", None)
    if input_ids is None or update is None:
        return cache
    if "cache_kwargs" not in inspect.signature(update).parameters:  # transformers 5
        return cache
    past = int(cache.get_seq_length())
    positions = torch.arange(past, past + input_ids.shape[1], device=input_ids.device)
    return _Told(cache, positions)


class _ContextEnd(StoppingCriteria):
    """Stops with the last token that a model can predict: it has no positions for more."""

    def __init__(self, context_length: int) -> None:
        self.context_length = context_length

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """Whether each sequence of the batch is done."""
        end = input_ids.shape[1] > self.context_length
        if end:
            warnings.warn(
                f"generation stops here, at the end of context_length={self.context_length}",
                stacklevel=2,
            )
        return torch.full(input_ids.shape[:1], end, dtype=torch.bool, device=input_ids.device)
