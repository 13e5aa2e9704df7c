"""What this installation can do."""

from __future__ import annotations

import platform

import torch

from . import backends


def show_config() -> None:
    """Print versions, and what each backend can do here or why it cannot."""
    from . import __version__

    print(f"fastpe {__version__}, torch {torch.__version__}, python {platform.python_version()}")
    print(f"{platform.platform()}, {torch.get_num_threads()} threads")
    for name, reason in backends.available_backends().items():
        if reason is not None:
            print(f"  {name:10} unavailable: {reason}")
        else:
            print(f"  {name:10} {backends.describe(name)}")
    for device, where in (("cpu", "the CPU"), ("cuda", "a GPU")):
        if device == "cpu" or torch.cuda.is_available():
            usual = torch.device(device), torch.float32, (64, 64, 64)
            try:
                print(f"  auto       {backends.resolve('auto', *usual)!r} for tensors on {where}")
            except RuntimeError as error:  # a check that cannot run now
                print(f"  auto       not known now for tensors on {where}: {error}")
