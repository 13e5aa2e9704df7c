"""What this installation can do."""

from __future__ import annotations

import platform

import torch

from .. import backends


def show_config() -> None:
    """Print versions, and what each backend can do here or why it cannot."""
    from .. import __version__

    print(f"fastpe {__version__}, torch {torch.__version__}, python {platform.python_version()}")
    print(f"{platform.platform()}, {torch.get_num_threads()} threads")
    for name, reason in backends.available_backends().items():
        if reason is not None:
            print(f"  {name:10} unavailable: {reason}")
        else:
            print(f"  {name:10} {backends.describe(name)}")
    cpu, current = torch.device("cpu"), backends.current_device()
    for device in dict.fromkeys((cpu, current)):
        where = "the CPU" if device == cpu else "a GPU"
        try:
            chosen = repr(backends.resolve("auto", device, torch.float32, (64, 64, 64)))
        except RuntimeError as error:  # of a check that cannot run now
            chosen = f"not known now: {error}"
        print(f"  auto       {chosen} for tensors on {where}")
