"""fastpe as an attention implementation of Hugging Face transformers, and a cache of constant size.

    from fastpe.integrations.transformers import StateCache, register

    register()
    model = AutoModelForCausalLM.from_config(config, attn_implementation="fastpe")
    model.generate(**inputs, cache=StateCache())  # before transformers 5.24: past_key_values=

The model keeps its projections and its rotary encoding; the feature map applies to the rotated
queries and keys. Weights trained with softmax must be trained again. `save_pretrained` writes the
arguments of `register` into the configuration, and `from_pretrained` compares them
(`transformers_config`).
"""

from __future__ import annotations

import re
import warnings
from functools import partial

import torch
from torch import Tensor, nn

from .. import backends
from ..attention.api import causal_linear_attention, linear_attention
from ..attention.state import LinearAttentionState
from ..attention.validation import check_options
from ..feature_maps.base import FeatureMap

try:
    from transformers.cache_utils import Cache, CacheLayerMixin
    from transformers.configuration_utils import PreTrainedConfig
    from transformers.masking_utils import (
        AttentionMaskInterface,
        bidirectional_mask_function,
        causal_mask_function,
    )
    from transformers.modeling_utils import AttentionInterface

    from . import transformers_config
except ImportError as error:
    raise ImportError(
        "fastpe.integrations.transformers needs transformers >= 5.5: "
        f"pip install -e '.[transformers]' in a clone ({error})"
    ) from error

__all__ = ["StateCache", "register"]

# options of other implementations that change logits, and how to do without them
_OF_LOGITS = {
    "softcap": "set attn_logit_softcapping=None in the model's config",
    "s_aux": "the model has sinks, which no setting of its config removes: use another model",
    "position_bias": (
        "the model adds biases to its logits, which no setting of its config removes: use a model "
        "with rotary or absolute positions"
    ),
    "sliding_window": "set sliding_window=None in the model's config",
}
# the names that configurations give to the dropout of attention weights
_DROPOUTS = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob", "attn_dropout")
_NO_KEYS = (
    "StateCache holds no keys: it is for models with the attn_implementation of "
    "fastpe.integrations.transformers.register"
)


def register(
    name: str = "fastpe",
    *,
    feature_map: str | FeatureMap = "elu1",
    normalize: bool | str = True,
    eps: float = 1e-6,
    backend: str = "auto",
) -> None:
    """Register fastpe's attention with transformers as attn_implementation=name.

    o_m = sum_{n<=m} (phi(q_m) . phi(k_n)) v_n / (sum_{n<=m} phi(q_m) . phi(k_n) + eps); the sums
    run over all n in modules that are not causal. There are no logits, so the model's `scaling` is
    unused, and no weights to return or to drop out.

    A model's forward raises ValueError if it asks for attention dropout in training, sliding
    windows, soft caps, sinks or biases of logits, packed sequences, masks per query or static
    caches. The error says what to set in the configuration. Compiled transformers treats batches
    without attention_mask and without cache as packed: give it the mask.

    `save_pretrained` writes the name and these arguments into config.json. `from_pretrained`
    refuses the model if you called `register` with other arguments (the backend may differ) or not
    at all.

    Args:
        name: The attn_implementation that models ask for; it is saved with them.
        feature_map: phi, see `causal_linear_attention`. All layers of all models share a module;
            you move it between devices, train it and redraw its noise. `save_pretrained` writes
            only a digest of its state: save its state_dict yourself, and load it before `register`.
        normalize: True, False or "abs", see `causal_linear_attention`.
        eps: Epsilon of the normaliser.
        backend: Backend, see `causal_linear_attention`.

    Raises:
        ValueError, TypeError: an argument is not as above.

    Warns:
        UserWarning: the feature map has parameters to train, or the name had other arguments.
    """
    _check_name(name)
    feature_map = check_options(feature_map, normalize, eps, None)
    backends.check_name(backend)
    options = {
        "feature_map": feature_map,
        "normalize": normalize,
        "eps": eps,
        "backend": backend,
    }
    _warn_of(name, options)
    AttentionInterface.register(name, partial(_attention, options=options))
    AttentionMaskInterface.register(name, _mask)


def _warn_of(name: str, options: dict[str, object]) -> None:
    feature_map, before = options["feature_map"], _options_of(name)
    learned = feature_map.parameters() if isinstance(feature_map, FeatureMap) else ()
    if any(x.requires_grad for x in learned):
        warnings.warn(
            f"feature_map {feature_map.signature} has parameters that belong to no model, so "
            "model.parameters() and save_pretrained omit them. Train them and save "
            "feature_map.state_dict() yourself, or freeze them (feature_map.requires_grad_(False))",
            stacklevel=3,
        )
    described = transformers_config.described
    if before is not None and described(before) != described(options):
        warnings.warn(
            f"name {name!r} was registered with other arguments: models made with it now use the "
            "new ones. Register each set of arguments under its own name",
            stacklevel=3,
        )


def _options_of(name: str) -> dict[str, object] | None:
    """Return the arguments of `register` for a name; None for other implementations."""
    function = AttentionInterface().get(name)
    ours = isinstance(function, partial) and function.func is _attention
    return function.keywords["options"] if ours else None


def _check_name(name: str) -> None:
    # transformers reads other names as hub repositories or as its own implementations
    taken = re.compile(r"eager|sdpa|flash|flex_attention|paged")
    if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+", name) or taken.search(name):
        raise ValueError(
            "name must be of letters, digits, '_', '-' and '.', without transformers' own eager, "
            f"sdpa, flash, flex_attention and paged, got {name!r}"
        )


class StateCache(Cache):
    """A cache for `generate` that keeps the sums of linear attention instead of keys and values.

    Its size and the time of a token do not depend on the number of tokens before. Sums cannot
    forget: you cannot mask a key later, and removing tokens, as assisted generation does, raises
    ValueError.
    """

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=_StateLayer)


class _StateLayer(CacheLayerMixin):
    """The state of one layer of a model; `_attention` reads and replaces it."""

    def __init__(self) -> None:
        super().__init__()
        self.state: LinearAttentionState | None = None
        self.length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[_NewKeys, Tensor]:
        # only the attention function gets the queries, so it updates the state
        self.lazy_initialization(key_states, value_states)
        self.length += key_states.shape[-2]
        return _NewKeys(key_states, self), value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, self.length

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1

    # the name it had before transformers 5.16
    get_max_cache_shape = get_max_length

    def reset(self) -> None:
        self.state, self.length, self.is_initialized = None, 0, False

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise ValueError("a StateCache cannot be cropped: its sums do not tell tokens apart")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.state is not None:
            batch = torch.arange(self.state.s.shape[0], device=self.state.s.device)
            self._select(batch.repeat_interleave(repeats))

    def _select(self, rows: Tensor) -> None:
        if self.state is not None:
            names = "s", "z", "length", "c", "lost"
            of_batch = {name: getattr(self.state, name) for name in names}
            self.state = self.state._replace(
                **{n: x[rows.to(x.device)] for n, x in of_batch.items() if isinstance(x, Tensor)}
            )


class _NewKeys:
    """New keys [B, Hk, T, D] that `update` hands to `_attention`, with the layer's state.

    This is not a tensor, so every other implementation raises instead of attending to these alone.
    """

    def __init__(self, keys: Tensor, layer: _StateLayer) -> None:
        self.keys, self.layer = keys, layer

    def __getattr__(self, name: str) -> None:
        raise AttributeError(_NO_KEYS)

    @classmethod
    def __torch_function__(cls, *args: object) -> None:
        raise TypeError(_NO_KEYS)


def _mask(
    *,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor,
    kv_offset: int,
    mask_function: object,
    attention_mask: Tensor | None,
    config: PreTrainedConfig | None = None,
    **kwargs: object,
) -> Tensor | _Refused | None:
    """Return True at keys that are not padding, [B, kv_length], or None if no key is padding."""
    if mask_function not in (causal_mask_function, bidirectional_mask_function):
        return _Refused(
            "attn_implementation of fastpe takes causal masks and padding only, but the model asks "
            f"for another mask: {_remedy_of_mask(config)}"
        )
    causal = mask_function is causal_mask_function
    if causal and (isinstance(q_offset, Tensor) or q_offset + q_length != kv_offset + kv_length):
        raise ValueError(
            "attn_implementation of fastpe needs keys that end with the last query: use "
            "StateCache or DynamicCache, not a static cache (cache_implementation=None)"
        )
    if attention_mask is None:
        return None
    attention_mask = attention_mask[:, kv_offset : kv_offset + kv_length]
    if attention_mask.shape[1] != kv_length:
        raise ValueError(
            f"attention_mask must cover the {kv_offset + kv_length} tokens so far, "
            f"got {kv_offset + attention_mask.shape[1]}: add the columns of tokens in the cache"
        )
    return attention_mask


class _Refused:
    """An unsupported mask; raises only if a layer uses it, since Gemma also makes unused masks."""

    def __init__(self, reason: str) -> None:
        self.reason = reason


def _remedy_of_mask(config: PreTrainedConfig | None) -> str:
    layer_types = getattr(config, "layer_types", None)
    if layer_types is not None:
        for kind in ("sliding_attention", "chunked_attention"):
            if kind in layer_types:
                return (
                    f"layer_types of its config has {kind!r}; build the model with "
                    "layer_types=['full_attention'] * num_hidden_layers"
                )
    elif getattr(config, "sliding_window", None) is not None:
        return f"sliding_window of its config is {config.sliding_window}; set it to None"
    return (
        "packed sequences (position_ids that restart), a mask per query or a block; give each "
        "sequence a row of its own, padded, with attention_mask [B, T]"
    )


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor | _NewKeys,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    *,
    options: dict[str, object],
    **kwargs: object,
) -> tuple[Tensor, None]:
    """Return o [B, Tq, H, E] and None for the weights; transformers calls this.

    query is [B, H, Tq, D], key [B, Hk, Tk, D], value [B, Hk, Tk, E]. attention_mask comes from
    `_mask`, and options are the arguments of `register`.
    """
    if dropout:
        raise ValueError(
            f"attention dropout must be 0, as linear attention has no weights, got {dropout}: "
            f"build the model with {_dropout_of(module)}=0 in its config"
        )
    if isinstance(attention_mask, _Refused):
        raise ValueError(attention_mask.reason)
    asked = [name for name in _OF_LOGITS if kwargs.get(name) is not None]
    if asked:
        raise ValueError(
            f"{asked[0]} must be None, as linear attention has no logits, got "
            f"{_brief(kwargs[asked[0]])}: {_OF_LOGITS[asked[0]]}"
        )
    if attention_mask is not None and attention_mask.ndim != 2:
        raise ValueError(
            f"attention_mask must be [B, Tk], true where a key is no padding, got shape "
            f"{tuple(attention_mask.shape)}: only softmax takes masks per query"
        )
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    layer = key.layer if isinstance(key, _NewKeys) else None
    keys = key if layer is None else key.keys
    q, k, v = (x.transpose(1, 2) for x in (query, keys, value))
    padding = None if attention_mask is None else ~attention_mask.bool()
    options = {"key_padding_mask": padding, **options}
    if not causal:
        if layer is not None:
            raise ValueError(
                "past_key_values must not be a StateCache in a module that is not causal: it holds "
                "sums up to a token"
            )
        return linear_attention(q, k, v, **options), None
    if layer is None:
        return causal_linear_attention(q, k, v, align="end", **options), None
    o, layer.state = causal_linear_attention(
        q, k, v, initial_state=layer.state, output_final_state=True, **options
    )
    return o, None


def _dropout_of(module: nn.Module) -> str:
    """Return the name of attention dropout in the model's configuration."""
    config = getattr(module, "config", None)
    named = [name for name in _DROPOUTS if getattr(config, name, 0)]
    return named[0] if named else "attention_dropout (or attn_pdrop)"


def _brief(x: object) -> str:
    return f"a tensor {tuple(x.shape)}" if isinstance(x, Tensor) else repr(x)


transformers_config.install(_options_of)
