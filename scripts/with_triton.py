#!/usr/bin/env python
"""Run a Python script with another version of Triton than the environment's.

    python scripts/with_triton.py 3.6.0 scripts/aot_check.py --tests --sample

The first call installs the version, without dependencies, in build/triton-VERSION-pyMAJOR.MINOR.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

BUILD = Path(__file__).parent.parent / "build"


def install(version: str) -> Path:
    """Return the folder of a version; pip fills it if it is missing."""
    folder = BUILD / f"triton-{version}-py{sys.version_info[0]}.{sys.version_info[1]}"
    if not folder.exists():
        BUILD.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=BUILD) as made:
            target = Path(made) / "packages"
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
            # the environment's constraints name its own Triton
            alone = {k: x for k, x in os.environ.items() if k != "PIP_CONSTRAINT"}
            command = [*pip, "--target", str(target), f"triton=={version}"]
            subprocess.run(command, check=True, env=alone)
            target.rename(folder)
    return folder


def main() -> None:
    """Replace this process by the script."""
    version, *command = sys.argv[1:]
    paths = [str(install(version)), os.environ.get("PYTHONPATH")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    os.execve(sys.executable, [sys.executable, *command], environment)


if __name__ == "__main__":
    main()
