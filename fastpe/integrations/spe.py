"""Parameters of the published SPE packages (https://github.com/aliutkus/spe)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from ..encodings.convspe import ConvSPE
from ..encodings.spe import SineSPE

# the packages' names of parameters; in the PyTorch package conv_k makes the codes of queries
_NAMES = {
    "pytorch": {"weight_q": "conv_k.weight", "weight_k": "conv_q.weight"},
    "jax": {"weight_q": "conv_q.kernel", "weight_k": "conv_k.kernel"},
}


def load_spe_state_dict(
    module: SineSPE | ConvSPE, state_dict: Mapping[str, object], *, package: str = "pytorch"
) -> None:
    """Copy the parameters of a published SPE package into a module of the same sizes.

    This swaps `conv_q` and `conv_k` of the PyTorch package, where `conv_k` makes the codes of
    queries. It negates the gate of the JAX package, which has the opposite sign.

    Args:
        module: A SineSPE or ConvSPE, or a share of one, which has only a gate.
        state_dict: Arrays or tensors by name: freqs, offsets and gains [H, D, K] for SineSPE,
            conv_q and conv_k for ConvSPE (PyTorch's "conv_q.weight" [H D, 1, kappa], JAX's
            {"conv_q": {"kernel": [kappa, 1, H D]}}); and the gate [H, D] of SPEFilter or SPEGate
            if the module has one.
        package: "pytorch" or "jax".
    Raises:
        TypeError: module is of another type.
        ValueError: a name is missing or unknown, or a shape is not the module's.
    """
    if not isinstance(module, (SineSPE, ConvSPE)):
        raise TypeError(f"module must be a SineSPE or ConvSPE, got {type(module).__name__}")
    if package not in _NAMES:
        raise ValueError(f"package must be 'pytorch' or 'jax', got {package!r}")
    given = dict(_flat(state_dict))
    own = dict(module.named_parameters(recurse=False))
    names = {name: _NAMES[package].get(name, name) for name in own}
    if given.keys() != set(names.values()):
        raise ValueError(
            f"state_dict must have {sorted(names.values())} for this module, got {sorted(given)}"
        )
    values = {}
    for name, p in own.items():
        value = torch.as_tensor(given[names[name]])
        wanted = _shape(name, p, package)
        if tuple(value.shape) != wanted:
            raise ValueError(
                f"state_dict[{names[name]!r}] must be of shape {wanted}, got {tuple(value.shape)}"
            )
        if name.startswith("weight"):
            value = value.movedim(-1, 0) if package == "jax" else value
        elif name == "gate" and package == "jax":
            value = -value
        values[name] = value
    # change nothing unless everything fits
    with torch.no_grad():
        for name, value in values.items():
            own[name].copy_(value.reshape(own[name].shape))


def _flat(tree: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _shape(name: str, p: Tensor, package: str) -> tuple[int, ...]:
    if name == "gate":
        return tuple(p.shape)
    h, d, n = p.shape[:3]
    if not name.startswith("weight"):
        return h, d, n
    return (h * d, 1, n) if package == "pytorch" else (n, 1, h * d)
