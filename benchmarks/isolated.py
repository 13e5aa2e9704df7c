"""Functions run in fresh processes, so that no measurement meets what another left behind.

Processes are forked from a server that has imported the slow modules and done nothing with them:
each starts in milliseconds, with no memory, threads or caches of another.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import sys
import traceback
import warnings
from collections.abc import Callable

# the last one is what the first backward imports, for most of a second
PRELOAD = ("torch", "torch.fx.experimental.symbolic_shapes", "numpy", "fastpe")


class Isolated:
    """Runs functions in fresh processes, one at a time."""

    def __init__(self) -> None:
        methods = multiprocessing.get_all_start_methods()
        self._context = multiprocessing.get_context(
            "forkserver" if "forkserver" in methods else "spawn"
        )
        if "forkserver" in methods:
            self._context.set_forkserver_preload(list(PRELOAD))

    def __call__(self, function: Callable[..., dict], *args: object) -> dict:
        """Return what the function returns, or {"error": why} if it raised or its process died."""
        receive, send = self._context.Pipe(duplex=False)
        process = self._context.Process(target=_child, args=(send, function, args))
        process.start()
        send.close()
        try:
            multiprocessing.connection.wait([receive, process.sentinel])
            result = receive.recv() if receive.poll() else None
        except EOFError:
            result = None
        finally:
            process.join()
        if result is None:
            return {"error": f"the process ended with code {process.exitcode} (-9: out of memory)"}
        return result


def _child(send: multiprocessing.connection.Connection, function: Callable, args: tuple) -> None:
    warnings.filterwarnings("ignore", message="fastpe uses its PyTorch reference")
    try:
        send.send(function(*args))
    except Exception as error:
        traceback.print_exc(limit=-4, file=sys.stderr)
        send.send({"error": f"{type(error).__name__}: {error}".splitlines()[0]})
    finally:
        send.close()
