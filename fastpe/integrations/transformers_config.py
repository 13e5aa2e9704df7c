"""The entry `fastpe` of a transformers configuration: the attention used in training.

transformers saves neither the name of an attention implementation nor its options. After `install`
every configuration saves both, and every model compares them with the arguments of `register`.
Without fastpe, transformers refuses the model because of the unknown name.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable
from functools import wraps

import torch
from torch import Tensor
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel

from ..feature_maps.base import FeatureMap

# options that do not change outputs
_NOT_COMPARED = {"name", "backend"}
_TRAIN_ANEW = (
    "to train the weights again, pass fastpe=None to from_pretrained, or set config.fastpe to "
    "None, in sub-configs too"
)

Options = dict[str, object]


def install(options_of: Callable[[str], Options | None]) -> None:
    """Patch transformers: configurations carry their entry, and models check it.

    options_of returns the options of `register` for a name, None for other implementations.
    """
    to_dict = PreTrainedConfig.to_dict
    choose = PreTrainedModel.get_correct_attn_implementation

    @wraps(to_dict)
    def to_dict_with_entry(self: PreTrainedConfig) -> dict[str, object]:
        output = to_dict(self)
        entry = _entry(self, options_of)
        if entry is None:
            output.pop("fastpe", None)
        else:
            output["fastpe"] = entry
        implementation = _implementation(self, options_of)
        if implementation is not None:
            output["attn_implementation"] = implementation
        return output

    @wraps(choose)
    def choose_and_check(
        self: PreTrainedModel, requested_attention: str | None, is_init_check: bool = False
    ) -> str:
        requested = _checked(self, requested_attention, is_init_check, options_of)
        return choose(self, requested, is_init_check)

    PreTrainedConfig.to_dict = to_dict_with_entry
    PreTrainedModel.get_correct_attn_implementation = choose_and_check


def _entry(config: PreTrainedConfig, options_of: Callable) -> Options | None:
    # describe our attention if it is in use, else keep the entry that the weights came with
    name = getattr(config, "_attn_implementation", None)
    options = options_of(name)
    return vars(config).get("fastpe") if options is None else {"name": name, **described(options)}


def _implementation(config: PreTrainedConfig, options_of: Callable) -> str | dict | None:
    """Return the attn_implementation to save: a dict by part if the model's parts differ."""
    entry = _entry(config, options_of)
    own = None if entry is None else entry["name"]
    configs = {key: getattr(config, key, None) for key in config.sub_configs}
    parts = {
        key: _implementation(part, options_of)
        for key, part in configs.items()
        if isinstance(part, PreTrainedConfig)
    }
    if all(part == own for part in parts.values()):
        return own
    if own is not None:
        # transformers gives `own` to every part that the dict lacks
        parts = {key: part or configs[key]._attn_implementation for key, part in parts.items()}
    return {key: part for key, part in {"": own, **parts}.items() if part is not None}


def described(options: Options) -> Options:
    """Return options of `register` for JSON; a module becomes its signature and state."""
    feature_map = options["feature_map"]
    if not isinstance(feature_map, FeatureMap):
        return dict(options)
    state = {name: _digest(x) for name, x in feature_map.state_dict().items()}
    if feature_map.noise_key is not None:  # plain numbers instead of their codes
        codes = "seed_code", "step_code"
        state = {name: x for name, x in state.items() if name not in codes}
        state |= {"seed": feature_map.seed, "step": feature_map.step}
    return {**options, "feature_map": feature_map.signature, "feature_map_state": state}


def _digest(x: object) -> int | float | str:
    if not isinstance(x, Tensor):
        return str(x)
    if x.ndim == 0:
        return x.item()
    raw = x.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return f"{x.dtype} {tuple(x.shape)} sha256 {hashlib.sha256(raw).hexdigest()[:16]}"


def _checked(
    model: PreTrainedModel, requested: str | None, is_init_check: bool, options_of: Callable
) -> str | None:
    """Return the implementation to use: the requested one, else the entry's."""
    config = model.config
    entry = _read_entry(config)
    if requested is None and entry is not None:
        requested = entry["name"]
    options = options_of(requested)
    if options is not None:
        _check_interface(model, requested)
        if entry is not None:
            _compare(requested, described(options), entry)
        # from_pretrained builds models on "meta" before it loads weights
        loaded = not is_init_check or torch.get_default_device().type == "meta"
        if config.name_or_path and loaded and "fastpe" not in vars(config):
            warnings.warn(
                f"attn_implementation is {requested!r}, but the config of {config.name_or_path!r} "
                "has no entry `fastpe` to say that its weights were trained with it: weights "
                "trained with softmax must be trained again (save_pretrained then adds the entry)",
                stacklevel=4,
            )
    elif entry is not None and requested == entry["name"]:
        raise ValueError(
            f"attn_implementation {requested!r} must be registered before the model is made, as "
            f"its weights were trained with it (config.fastpe): call {_call(entry)} first"
        )
    elif entry is not None:
        warnings.warn(
            f"attn_implementation is {requested!r}, but the weights were trained with fastpe's "
            f"attention (config.fastpe), so outputs differ from the trained model's. Call "
            f"{_call(entry)} and pass attn_implementation={entry['name']!r}; {_TRAIN_ANEW}",
            stacklevel=4,
        )
    return requested


def _read_entry(config: PreTrainedConfig) -> Options | None:
    entry = vars(config).get("fastpe")
    keys = {"name", "feature_map", "normalize", "eps"}
    if entry is not None and not (isinstance(entry, dict) and keys <= set(entry)):
        raise ValueError(
            "config.fastpe must be the entry that save_pretrained writes, with name, feature_map, "
            f"normalize and eps, got {entry!r}"
        )
    return entry


def _check_interface(model: PreTrainedModel, name: str) -> None:
    """Refuse a model with its own attention, which would attend without a causal mask."""
    if not (model._supports_attention_backend or model._can_set_attn_implementation()):
        raise ValueError(
            f"attn_implementation {name!r} must be for models whose attention goes through "
            f"transformers' AttentionInterface, got {type(model).__name__}, which would ignore it: "
            "use another model, or name the parts that it is for, as attn_implementation="
            f"{{'text_config': {name!r}}}. If this model does use the interface, set "
            "_supports_attention_backend = True on its class"
        )


def _compare(name: str, here: Options, entry: Options) -> None:
    for key in sorted({*here, *entry} - _NOT_COMPARED):
        if here.get(key) != entry.get(key):
            raise ValueError(
                f"{key} of attn_implementation {name!r} must be {entry.get(key)!r}, with which the "
                f"weights were trained (config.fastpe), got {here.get(key)!r}: call {_call(entry)} "
                f"before the model is made; {_TRAIN_ANEW}"
            )


def _call(entry: Options) -> str:
    """Return the call of `register` that matches the entry."""
    state = entry.get("feature_map_state")
    # a module's signature is a constructor call
    feature_map = repr(entry["feature_map"]) if state is None else entry["feature_map"]
    call = (
        f"fastpe.integrations.transformers.register({entry['name']!r}, feature_map={feature_map}, "
        f"normalize={entry['normalize']!r}, eps={entry['eps']!r})"
    )
    return f"{call}, where the map's state_dict() is {state}" if state else call
