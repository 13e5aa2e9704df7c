#!/usr/bin/env python
"""Record how a Triton cache was made, and report whether another machine used it.

    python scripts/gpu_cache.py stamp FOLDER     when you make the cache (gpu_prepare.sh)
    python scripts/gpu_cache.py report FOLDER    after a run on the card

Triton finds an entry by its version, the bytes of its library (one for each version of Python), and
the lines of the kernels. If one of these differs, it silently compiles again.
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
    """Return twelve digits of a hash of files."""
    found = hashlib.sha256()
    for file in files:
        found.update(file.read_bytes())
    return found.hexdigest()[:12]


def made_with() -> dict[str, str]:
    """Return this machine's versions and digests that the entries of a cache depend on."""
    triton = importlib.metadata.distribution("triton")
    library = f"triton/_C/libtriton.{sysconfig.get_config_var('EXT_SUFFIX').split('.')[-1]}"
    return {
        "python": ".".join(platform.python_version_tuple()[:2]),
        "triton": triton.version,
        "libtriton": digest(Path(triton.locate_file(library))),
        "kernels": digest(*sorted(KERNELS.glob("*.py"))),
    }


def stamp(folder: Path) -> None:
    """Write `made_with` into the cache."""
    (folder / "made_with.json").write_text(json.dumps(made_with()))


def report(folder: Path) -> str:
    """Return how many kernels came along, how many were compiled here, and what differs."""
    mark, here = folder / "made_with.json", made_with()
    codes = list(folder.glob("*/*.cubin"))
    if not mark.exists():
        return f"cache: none came along, {len(codes)} kernels compiled here; {here}"
    there = json.loads(mark.read_text())
    new = [x for x in codes if x.stat().st_mtime > mark.stat().st_mtime]
    other = [f"{n} {there.get(n)} there, {x} here" for n, x in here.items() if there.get(n) != x]
    said = f"cache: {len(codes) - len(new)} kernels came along, {len(new)} compiled here; "
    return said + ("; ".join(other) or f"made with the same versions, {here}")


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
