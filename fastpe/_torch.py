"""The private functions of torch that fastpe calls, in one place.

Each has a fallback, which may be slower but gives right results: without a function that tells
whether torch watches an operation, `observed` says that it does. `MISSING` has the names that this
version of torch lacks, and a test fails for each.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad

MISSING: list[str] = []


def _private(name: str, fallback: Callable) -> Callable:
    found = torch
    for part in name.split("."):
        found = getattr(found, part, None)
    if found is None:
        MISSING.append(name)
    return fallback if found is None else found


def _in_checkpoint() -> int:
    """Return 0 if a checkpoint runs a forward again inside a backward, else -1."""
    frame = sys._getframe()
    while frame is not None:
        file, name = frame.f_code.co_filename, frame.f_code.co_name
        if file.endswith("checkpoint.py") and name in ("unpack_hook", "backward"):
            return 0
        frame = frame.f_back
    return -1


# how many modes of __torch_dispatch__ are on
_modes = _private("_C._len_torch_dispatch_stack", lambda: 1)
# the innermost transform of torch.func, or None
transform = _private("_C._functorch.peek_interpreter_stack", lambda: None)
_tracing = _private("_C._get_tracing_state", lambda: True)
# the number of the backward that runs in this thread, or -1
backward_number = _private("_C._current_graph_task_id", _in_checkpoint)
# the hooks that pack and unpack what autograd saves, or None
saved_tensors_hooks = _private(
    "_C._autograd._top_saved_tensors_default_hooks", lambda ignore_is_tracing: None
)
# run a function when the current backward ends
after_backward = _private("autograd.Variable._execution_engine.queue_callback", lambda run: None)
# raise RuntimeError where a condition is computed, on a GPU too, without waiting for it
assert_later = _private("_assert_async", lambda condition, message: None)

# a context in which tensors are real ones, also under FakeTensorMode
without_modes = _private("utils._python_dispatch._disable_current_modes", contextlib.nullcontext)

if not hasattr(forward_ad, "_current_level"):
    MISSING.append("autograd.forward_ad._current_level")

_blind = bool(MISSING)
_PLAIN = {Tensor, torch.nn.Parameter, type(None)}


def observed() -> bool:
    """Return whether torch traces or transforms operations now, besides computing them."""
    return (
        torch.compiler.is_compiling()
        or _modes() > 0
        or transform() is not None
        or getattr(forward_ad, "_current_level", 0) >= 0
        or _tracing() is not None
        or _blind
    )


def plain(tensors: tuple[Tensor | None, ...]) -> bool:
    """Return whether tensors are ordinary ones, and nothing traces or transforms them."""
    return not observed() and not (set(map(type, tensors)) - _PLAIN)


def in_mode() -> bool:
    """Return whether torch compiles or a dispatch mode is on: tensors may hold no values then."""
    return torch.compiler.is_compiling() or _modes() > 0


def constant_in_graphs(function: Callable) -> Callable:
    """Return the function, whose result torch.compile takes for a constant.

    The same as torch.compiler.assume_constant_result, without its import of the compiler.
    """
    function._dynamo_marked_constant = True
    return function
