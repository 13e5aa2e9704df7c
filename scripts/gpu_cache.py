#!/usr/bin/env python
"""Say what a carried cache of Triton was made with, and whether this machine took it.

    python scripts/gpu_cache.py stamp FOLDER     when it is made (gpu_prepare.sh)
    python scripts/gpu_cache.py report FOLDER    after a run on the card

Triton finds an entry by its version, the bytes of its library (one for each version of Python), and
the lines of the kernels: where one differs, it compiles anew without a word.
"""

import argparse
import hashlib
import importlib.metadata
import json
import platform
import sysconfig
from pathlib import Path

KERNELS = Path(__file__).parent.parent / "fastpe" / "backends" / "triton"


def digest(*files: Path) -> str:
    """Return twelve digits that files of other bytes do not have."""
    found = hashlib.sha256()
    for file in files:
        found.update(file.read_bytes())
    return found.hexdigest()[:12]


def made_with() -> dict[str, str]:
    """Return what the entries of a cache depend on, as it is here."""
    triton = importlib.metadata.distribution("triton")
    library = f"triton/_C/libtriton.{sysconfig.get_config_var('EXT_SUFFIX').split('.')[-1]}"
    return {
        "python": ".".join(platform.python_version_tuple()[:2]),
        "triton": triton.version,
        "libtriton": digest(Path(triton.locate_file(library))),
        "kernels": digest(*sorted(KERNELS.glob("*.py"))),
    }


def stamp(folder: Path) -> None:
    """Write what the cache was made with into it."""
    (folder / "made_with.json").write_text(json.dumps(made_with()))


def report(folder: Path) -> str:
    """Return in a few lines what came along, what was compiled here, and what differs."""
    mark, here = folder / "made_with.json", made_with()
    codes = list(folder.glob("*/*.cubin"))
    if not mark.exists():
        return f"cache: none came along, {len(codes)} kernels compiled here; {here}"
    there = json.loads(mark.read_text())
    new = [x for x in codes if x.stat().st_mtime > mark.stat().st_mtime]
    other = [f"{n} {there.get(n)} there, {x} here" for n, x in here.items() if there.get(n) != x]
    said = f"cache: {len(codes) - len(new)} kernels came along, {len(new)} compiled here; "
    return said + ("; ".join(other) or f"made with what is here, {here}")


def main() -> None:
    """Stamp or report."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=["stamp", "report"])
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    if args.what == "stamp":
        stamp(args.folder)
    print(report(args.folder))


if __name__ == "__main__":
    main()
