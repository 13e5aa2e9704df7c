"""Functions run in fresh processes, so that no measurement meets the leftovers of another.

A server imports the slow modules and does nothing with them. Each process is forked from it: it
starts in milliseconds, without memory, threads or caches of another. On a GPU the functions run in
this process, because torch counts the GPU's memory and gives it back in between.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import sys
import traceback
import warnings
from collections.abc import Callable

import torch

from .memory import release

# the first backward imports the second one, for most of a second
PRELOAD = ("torch", "torch.fx.experimental.symbolic_shapes", "numpy", "fastpe")
_REFERENCE = "fastpe uses its PyTorch reference"


class Isolated:
    """Runs functions in fresh processes, one at a time for each thread that calls.

    Args:
        seconds: limit after which a process is ended with an error; None for no limit.
        preload: further modules for the server to import.
    """

    def __init__(self, seconds: float | None = None, preload: tuple[str, ...] = ()) -> None:
        self.seconds = seconds
        methods = multiprocessing.get_all_start_methods()
        self._context = multiprocessing.get_context(
            "forkserver" if "forkserver" in methods else "spawn"
        )
        if "forkserver" in methods:
            self._context.set_forkserver_preload([*PRELOAD, *preload])

    def __call__(self, function: Callable[..., dict], *args: object) -> dict:
        """Return the function's result, or {"error": why} if it raised or its process died."""
        receive, send = self._context.Pipe(duplex=False)
        process = self._context.Process(target=_child, args=(send, function, args))
        process.start()
        send.close()
        try:
            if not multiprocessing.connection.wait([receive, process.sentinel], self.seconds):
                process.kill()
                return {"error": f"not done after {self.seconds:g} s"}
            result = receive.recv() if receive.poll() else None
        except EOFError:
            result = None
        finally:
            process.join()
        if result is None:
            return {"error": f"the process ended with code {process.exitcode} (-9: out of memory)"}
        return result


class InProcess:
    """Runs functions here, because a fresh process would start the GPU anew for each."""

    def __init__(self, device: str) -> None:
        self._device = device

    def __call__(self, function: Callable[..., dict], *args: object) -> dict:
        """Return the function's result, or {"error": why} if it raised."""
        try:
            return _result(function, args)
        finally:
            release(self._device)


def runner(device: str) -> Isolated | InProcess:
    """Return the runner for measurements on a device."""
    if device == "cpu":
        return Isolated()
    warnings.filterwarnings("ignore", message=_REFERENCE)
    return InProcess(device)


def _result(function: Callable[..., dict], args: tuple) -> dict:
    try:
        return function(*args)
    except torch.OutOfMemoryError as error:
        return {"error": f"out of memory: {error}".splitlines()[0]}
    except Exception as error:
        traceback.print_exc(limit=-4, file=sys.stderr)
        return {"error": f"{type(error).__name__}: {error}".splitlines()[0]}


def _child(send: multiprocessing.connection.Connection, function: Callable, args: tuple) -> None:
    warnings.filterwarnings("ignore", message=_REFERENCE)
    try:
        send.send(_result(function, args))
    finally:
        send.close()
