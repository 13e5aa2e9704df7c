"""Whether this process was forked from one that may have had threads.

GNU OpenMP keeps threads for whoever has used several. A fork copies its record of them, but not the
threads: the next loop on several threads waits for them for ever. torch and the CPU library share
one OpenMP, so it does not matter whose loop started them.
"""

from __future__ import annotations

import os
from pathlib import Path

# of the kernel's flags of a process: forked, and has run no program since
_PF_FORKNOEXEC = 0x40


def _began_by_fork() -> bool:
    """Return whether the process was forked before this module was imported, where Linux says."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        return bool(int(fields[6]) & _PF_FORKNOEXEC)
    except (OSError, ValueError, IndexError):
        return False


forked = _began_by_fork()


def _note() -> None:
    global forked
    forked = True


if hasattr(os, "register_at_fork"):  # not on Windows, which does not fork
    os.register_at_fork(after_in_child=_note)
