"""Draw the kernels of the encodings on a piece of music: closed form above, estimate below.

    python examples/plot_kernels.py [--bars 16] [--out docs/kernels.png]

Each panel shows, for every pair of 16th notes of the piece, how much a query at one sees of a key
at the other, where content is the same everywhere: 1^T C 1 / D, C the kernel. The row below has the
same from features, as the attention computes it; noise is redrawn and averaged.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from torch import Tensor

import fastpe

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import pieces

HEAD_DIM = 16


def encodings(piece: pieces.Piece) -> dict[str, tuple[fastpe.PositionalEncoding, Tensor]]:
    """Return title -> encoding and positions [T] or [T, L]."""
    time, chord = torch.as_tensor(piece.time), torch.as_tensor(piece.chord)
    chroma = torch.as_tensor(piece.chroma).double()
    d = HEAD_DIM
    made = {
        "RoPE\ntime": (fastpe.RoPE(d), time),
        "RoPEPool\ntime": (fastpe.RoPEPool(d, 1), time),
        "SineSPE\ntime": (fastpe.SineSPE(d, 1, num_realizations=4096), time),
        "F-StrIPE unpooled\nchord": (fastpe.FStripe(d, 1, pool=False), chord),
        "F-StrIPE pooled\nchord": (fastpe.FStripe(d, 1), chord),
        "F-StrIPE:SFF\nchroma": (
            fastpe.FStripe(d, 1, num_levels=12, num_realizations=4096),
            chroma,
        ),
    }
    for encoding, _ in made.values():
        if hasattr(encoding, "freqs"):
            # as after training: periods of a bar or a few chords, no phase shift
            with torch.no_grad():
                encoding.freqs.normal_(-1.5, 0.7)
                encoding.offsets.zero_()
    return made


def main() -> None:
    """Draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bars", type=int, default=12)
    parser.add_argument("--data", type=Path, help=".npz file of music, default the prelude")
    parser.add_argument("--out", type=Path, default=Path("docs/kernels.png"))
    args = parser.parse_args()
    torch.manual_seed(0)
    piece = pieces.load(args.data).tile(16 * args.bars)
    cases = encodings(piece)
    figure, axes = plt.subplots(2, len(cases), figsize=(2.4 * len(cases), 5.4))
    with torch.no_grad():
        for column, (title, (encoding, positions)) in zip(axes.T, cases.items(), strict=True):
            exact, random = fastpe.diagnostics.plot_kernel(encoding, positions, column)
            error = (random - exact).norm() / exact.norm()
            print(f"{title.replace(chr(10), ', '):32} estimate off by {error:.1%}")
            for axis in column:
                axis.set(xlabel=None, ylabel=None, xticks=[], yticks=[])
            column[0].set_title(title, fontsize=10)
    axes[0, 0].set_ylabel("closed form\n(query position)", fontsize=10)
    axes[1, 0].set_ylabel("from features\n(query position)", fontsize=10)
    figure.supxlabel("key position: 16th notes of the Prelude in C, BWV 846", fontsize=10)
    figure.tight_layout()
    args.out.parent.mkdir(exist_ok=True)
    figure.savefig(args.out, dpi=110)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
