"""`PolyakPreTrainedModel`: a `Transformer` behind transformers' interface, without a task."""

# mypy: disable-error-code="override,no-untyped-call,misc,unused-ignore"
# (signatures of transformers differ between its versions, and some have no types)

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.utils.hub import cached_file

from polyak.errors import ConfigError, RunError, unknown
from polyak.files import give_usual_permissions, make_folder
from polyak.interop.huggingface.configuration import NAMES, PolyakConfig
from polyak.nn.transformer import Transformer
from polyak.rules import UpdateRule
from polyak.training.runs.model_files import (
    WEIGHTS_FILE,
    check_weights,
    write_stub,
    write_weights_hash,
)
from polyak.trust import trusting

_SHARED = ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set")


class PolyakPreTrainedModel(PreTrainedModel):
    """What the two models share: weights under polyak's own names, loading, saving, embeddings.

    The modules are children of this one, so that weights have the names of `Transformer`'s:
    `model.safetensors` of a run, of `save_pretrained` and `Transformer.state_dict()` agree.
    `transformer` is a `Transformer` over the same modules.
    """

    config_class = PolyakConfig
    config: PolyakConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True  # `num_items_in_batch` from Trainer
    _supports_sdpa = True
    _supports_cache_class = True
    _can_compile_fullgraph = False
    _no_split_modules: ClassVar[list[str]] = ["Block"]
    # transformers 5 wants target → source, 4 iterates over the targets
    _tied_weights_keys: ClassVar[dict[str, str]] = {"head.weight": "embedding.tokens.weight"}
    _causal: ClassVar[bool]

    transformer: Transformer

    def __init__(self, config: PolyakConfig, **options: Any) -> None:
        for name in options:  # what `from_pretrained` was given, and nothing before took
            raise unknown("option of a polyak model", name, NAMES)
        model_config = config.model_config()
        if model_config.causal != self._causal:
            other = "MaskedLM" if self._causal else "CausalLM"
            raise ConfigError(
                f"causal={model_config.causal}: {type(self).__name__} needs "
                f"causal={self._causal}; use AutoModelFor{other}"
            )
        super().__init__(config)
        transformer = Transformer(model_config)
        for shared in _SHARED:
            self.__dict__[shared] = transformer.__dict__[shared]
        self.__dict__["transformer"] = transformer  # not a child: its modules are children already
        self.gradient_checkpointing = False
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: `Transformer` draws its weights when it is built, and `from_pretrained` refuses
        files that leave any out, so there is never a weight that has to be drawn here."""

    def train(self, mode: bool = True) -> PolyakPreTrainedModel:
        """Training or evaluation mode."""
        super().train(mode)
        self.transformer.training = mode
        return self

    def _replicate_for_data_parallel(self) -> PolyakPreTrainedModel:
        replica: PolyakPreTrainedModel = super()._replicate_for_data_parallel()
        transformer = copy.copy(self.transformer)
        for shared in _SHARED:
            transformer.__dict__[shared] = replica.__dict__[shared]
        replica.__dict__["transformer"] = transformer
        return replica

    # Loading and saving

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike[str] | None, *args: Any, **kwargs: Any) -> Any:
        """Load a model; arguments as everywhere in transformers.

        Raises:
            RunError: weights are missing, left over, have other shapes, or are not those that
                were written.
            TrustError: its rule is code that was not made here, and `trust_remote_code` not true.
        """
        want_info = kwargs.pop("output_loading_info", False)
        # mismatches come back by name then, instead of as an error that names nothing
        kwargs |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
        try:
            if name is not None:
                _check_weights(os.fspath(name), kwargs)
            with trusting(bool(kwargs.get("trust_remote_code"))):
                loaded: Any = super().from_pretrained(name, *args, **kwargs)
        except SafetensorError as error:
            raise RunError(f"{name}: the weights cannot be read: {error}") from error
        model, info = loaded
        kinds = {"missing_keys": "missing", "unexpected_keys": "left over"}
        kinds |= {"mismatched_keys": "of another shape", "error_msgs": "not loaded:"}
        wrong = [f"{said} {_names(info[kind])}" for kind, said in kinds.items() if info.get(kind)]
        if wrong:
            raise RunError(f"{name}: weights do not fit config.json ({'; '.join(wrong)})")
        for module in model.modules():  # transformers 5 makes every loaded weight learnable
            if isinstance(module, UpdateRule):
                for scalar in module.options["frozen"]:
                    module.get_parameter(f"{scalar}_raw").requires_grad_(False)
        return (model, info) if want_info else model

    @classmethod
    def get_init_context(cls, *args: Any, **kwargs: Any) -> list[Any]:
        """As in transformers 5: no memory. Transformers 4 allocates each weight to discard it."""
        contexts = super().get_init_context(*args, **kwargs)
        return contexts if is_deepspeed_zero3_enabled() else [*contexts, torch.device("meta")]

    @classmethod
    def _load_pretrained_model(
        cls, model: Any, state_dict: Any, checkpoint_files: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """As in transformers, once the files are known to hold as much as the model needs.

        The model is without memory until then; afterwards, what is missing would be allocated.
        """
        if state_dict is None:
            _check_sizes(model, checkpoint_files or ())
        return super()._load_pretrained_model(model, state_dict, checkpoint_files, *args, **kwargs)

    def mark_tied_weights_as_initialized(self, loading_info: Any) -> None:
        """Transformers 5 would take a table that is missing under both its names for loaded."""
        if all(
            set(pair) <= loading_info.missing_keys for pair in self.all_tied_weights_keys.items()
        ):
            for source in self.all_tied_weights_keys.values():
                raise RunError(
                    f"{self.name_or_path}: weights do not fit config.json (missing {source})"
                )
        super().mark_tied_weights_as_initialized(loading_info)

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Save as everywhere in transformers, with the module that `auto_map` points to.

        Raises:
            RunError: `push_to_hub=True`, which would leave files out; use `push_to_hub`.
        """
        if kwargs.pop("push_to_hub", False):
            raise RunError("save_pretrained(push_to_hub=True): call push_to_hub(repo_id) instead")
        write_stub(make_folder(Path(save_directory)))
        super().save_pretrained(save_directory, **kwargs)
        if kwargs.get("is_main_process", True):
            for file in Path(save_directory).glob("*.safetensors"):
                give_usual_permissions(file)
            write_weights_hash(Path(save_directory))

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:
        """Upload weights, configuration and a model card; see `polyak.interop.huggingface.push`."""
        from polyak.interop.huggingface.sharing import push_model

        return push_model(self, repo_id, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoModel") -> None:
        """Nothing: saved folders import this class from polyak, no source is copied to them."""

    # Embeddings

    def get_input_embeddings(self) -> nn.Module:
        """The token table of the residual stream."""
        table: nn.Module = self.transformer.embedding.tokens
        return table

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace it."""
        self.transformer.embedding.tokens = value  # type: ignore[assignment]

    def get_output_embeddings(self) -> nn.Module:
        """The output matrix."""
        return self.transformer.head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace it."""
        self.transformer.head = new_embeddings  # type: ignore[assignment]

    def resize_token_embeddings(
        self,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
    ) -> nn.Module:
        """Change the number of token ids; the streams' own tables change with the others."""
        before = self.config.vocab_size
        table: nn.Module = super().resize_token_embeddings(
            new_num_tokens, pad_to_multiple_of, mean_resizing
        )
        after = self.config.vocab_size
        if after != before:
            stream: Any
            for stream in self.transformer.streams.values():
                stream.tokens = self._get_resized_embeddings(
                    stream.tokens, after, mean_resizing=mean_resizing
                )
            self.transformer.config = self.config.model_config()
        return table

    # Activation checkpointing

    def _set_gradient_checkpointing(
        self,
        enable: bool = True,
        gradient_checkpointing_func: Callable[..., Any] = checkpoint,
        every_n_layers: int = 1,
    ) -> None:
        """Recompute blocks in the backward pass instead of keeping what is inside them.

        Always with `use_reentrant=False`: reentrant checkpoints lose the gradients of nested
        arguments, and a rule's state is one.
        """
        self.gradient_checkpointing = enable
        recompute = partial(gradient_checkpointing_func, use_reentrant=False)
        for number, block in enumerate(self.transformer.blocks):
            block.__dict__.pop("forward", None)
            if enable and number % every_n_layers == 0:
                block.__dict__["forward"] = partial(_recomputed, recompute, block)

    # The forward pass

    def _logits(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        output_attentions: bool | None,
        output_hidden_states: bool,
        logits_to_keep: int | Tensor,
        **context: Any,
    ) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        if inputs_embeds is not None or input_ids is None:
            raise ConfigError(
                "inputs_embeds: a polyak model starts from token ids, since streams have tables "
                "of their own; pass input_ids"
            )
        if output_attentions:
            raise ConfigError(
                "output_attentions=True: the attention kernel keeps no weights; leave it out"
            )
        with ExitStack() as stack:
            seen = stack.enter_context(_hidden_states(self.transformer, output_hidden_states))
            try:
                features = self.transformer.features(input_ids, **context)
            except IndexError as error:  # of the look-up, on a CPU
                top, size = int(input_ids.max()), self.config.vocab_size
                if int(input_ids.min()) >= 0 and top < size:
                    raise
                raise ConfigError(
                    f"input_ids go from {int(input_ids.min())} to {top}, but vocab_size={size}; "
                    "the tokenizer is another model's"
                ) from error
        kept = features[:, _slice(logits_to_keep)]
        logits = self.transformer.head(kept)
        return logits, (*seen[:-1], features) if output_hidden_states else None

    def _choices(self, hidden_states: bool | None, return_dict: bool | None) -> tuple[bool, bool]:
        """What was asked for, or what the configuration says."""
        hidden = self.config.output_hidden_states if hidden_states is None else hidden_states
        named = self.config.return_dict if return_dict is None else return_dict
        return bool(hidden), bool(named)


def _recomputed(recompute: Callable[..., Any], block: nn.Module, *args: Any) -> Any:
    forward = partial(type(block).forward, block)
    if block.training and torch.is_grad_enabled():
        return recompute(forward, *args)
    return forward(*args)


@contextmanager
def _hidden_states(transformer: Transformer, wanted: bool) -> Iterator[list[Tensor]]:
    """A list that a forward pass fills with x before the first block and after each."""
    seen: list[Tensor] = []
    if not wanted:
        yield seen
        return
    blocks = list(transformer.blocks)
    hooks = [blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))]
    hooks += [
        block.register_forward_hook(lambda *call: seen.append(call[2][0])) for block in blocks
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _slice(logits_to_keep: int | Tensor) -> slice | Tensor:
    if isinstance(logits_to_keep, int):
        return slice(-logits_to_keep, None) if logits_to_keep else slice(None)
    return logits_to_keep


def _check_weights(name: str, kwargs: dict[str, Any]) -> None:
    """See that weights are those that were written: of a folder, or in the hub's cache."""
    options = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")
    given = {key: kwargs[key] for key in options if kwargs.get(key) is not None}
    if os.path.isdir(name):
        check_weights(Path(name, given.get("subfolder", "")))
        return
    for what in ("missing_entries", "connection_errors", "gated_repo"):  # loading says it better
        given[f"_raise_exceptions_for_{what}"] = False
    found = cached_file(name, WEIGHTS_FILE, **given)
    if found is not None and cached_file(name, "model.safetensors", **given) is not None:
        check_weights(Path(found).parent)  # one folder of the cache has both


FEW = 2**24
"""So many numbers (64 MiB) may be missing of weights before anything is loaded: their names are
told afterwards."""


def _check_sizes(model: nn.Module, files: Sequence[str]) -> None:
    """See that weights' headers hold about as many numbers as the model has parameters.

    Raises:
        RunError: they hold far fewer.
    """
    if any(not str(file).endswith(".safetensors") for file in files):
        return  # never written here
    held = 0
    for file in files:
        with safe_open(file, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118  # no mapping
                held += math.prod(weights.get_slice(name).get_shape())
    needed = sum(parameter.numel() for parameter in model.parameters())  # tied ones once
    if held + FEW < needed:
        where = files[0] if files else "no file"
        raise RunError(
            f"{where}: weights do not fit config.json ({held:,} numbers, {needed:,} needed)"
        )


def _names(found: Any) -> str:
    names = sorted(item if isinstance(item, str) else str(item[0]) for item in found)
    return ", ".join(names[:3]) + (" …" if len(names) > 3 else "")
