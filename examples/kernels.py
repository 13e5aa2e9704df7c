"""Draw the content kernel and the context kernel of each encoding on a piece of music.

    python examples/kernels.py [--bars 12] [--data file.npz --song 3] [--out docs/kernels.png]

In these encodings the score of a query at m and a key at n is a sum over components d of
F(q_md, k_nd) G_d(s_m, s_n). F depends on the content alone and is the product q_md k_nd. G depends
on the context alone: the positions (arXiv 2504.05364, Prop. 1). Pairs and pooled features also have
products of two components. Positions are time or musical structure:

* TIME: sixteenths
* REP: chords, numbered as they appear
* KEY: degrees of the key
* BIN: the pitch classes of the chord, a vector of 12

The picture has a row for each. Its left squares show G in closed form for the same content
everywhere, 1^T C 1 / D. Its right squares show the estimate from features, which the attention
computes. The fifth row has the notes as content, q^T C k / D. Noise is drawn once with R = 64;
features without noise are exact.

The last row splits one encoding: content x context = score for one component, and then the sum over
all components.
"""

from __future__ import annotations

import argparse
import io
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from PIL import Image
from torch import Tensor

import fastpe
from fastpe_lab import pieces

HEAD_DIM, REALIZATIONS, STEPS = 16, 64, 16
PRIORS = {
    "TIME": "sixteenths",
    "REP": "chords by\nappearance",
    "KEY": "degrees of\nthe key",
    "BIN": "pitch classes\nof the chord",
}
ENCODINGS = {
    "RoPE": lambda levels: fastpe.RoPE(HEAD_DIM, num_levels=levels, learned=True),
    "RoPEPool": lambda levels: fastpe.RoPEPool(HEAD_DIM, 1, num_levels=levels),
    "F-StrIPE unpooled": lambda levels: _stripe(levels, pool=False),
    "F-StrIPE pooled": lambda levels: _stripe(levels),
    # with time as positions this is SineSPE without a gate
    "SineSPE / F-StrIPE:SFF": lambda levels: _stripe(levels, num_realizations=REALIZATIONS),
}
APART = "F-StrIPE unpooled"


def _stripe(levels: int, **options: object) -> fastpe.FStripe:
    return fastpe.FStripe(HEAD_DIM, 1, num_levels=levels, unit_gains=True, **options)


@dataclass(frozen=True)
class Content:
    """Queries and keys of one head, [T, D] float64, from the notes."""

    q: Tensor
    k: Tensor


def make(name: str, levels: int) -> fastpe.PositionalEncoding:
    """Return an encoding with periods of a few positions, as training might leave it."""
    encoding = ENCODINGS[name](levels)
    with torch.no_grad():
        if hasattr(encoding, "freqs"):
            # one turn in about 11 steps for numbers, in 4 for pitch classes
            encoding.freqs.normal_(-1.5 if levels == 1 else 0.0, 0.7)
        elif levels > 1:
            # at first all levels have the same frequency
            encoding.theta.normal_()
    return encoding


def positions_of(piece: pieces.Piece) -> dict[str, Tensor]:
    """Return the positions of each prior, float64 [T], or [T, 12] for BIN."""
    labels = (piece.time, piece.chord, piece.key, piece.chroma)
    return {prior: torch.as_tensor(x).double() for prior, x in zip(PRIORS, labels, strict=True)}


def content_of(piece: pieces.Piece) -> Content:
    """Return embedded notes. Keys equal queries, so equal notes see each other."""
    q, _, _ = pieces.embed(piece, 1, HEAD_DIM, HEAD_DIM, dtype=torch.float64)
    return Content(q[0, :, 0], q[0, :, 0])


@torch.no_grad()
def scores(encoding: fastpe.PositionalEncoding, positions: Tensor, content: Content) -> Tensor:
    """Return q^T C k / D in closed form, [T, T]."""
    places, which = positions.unique(dim=0, return_inverse=True)
    out = torch.empty(len(positions), len(positions), dtype=torch.float64)
    for i, place in enumerate(places):
        context = encoding.kernel(place[None], places)[:, 0]  # [places, D, D]
        here = which == i
        seen = (content.q[here] @ context).transpose(0, 1)[:, which]  # [here, T, D]
        out[here] = (seen * content.k).sum(-1)
    return out / HEAD_DIM


@torch.no_grad()
def scores_from_features(
    encoding: fastpe.PositionalEncoding, positions: Tensor, content: Content
) -> Tensor:
    """Return the estimate of `scores` from the features of queries and keys, [T, T]."""
    at = positions.reshape(1, len(positions), -1)
    q, k = (
        encoding.features(x[None, :, None], at, side)[0, :, 0]
        for x, side in ((content.q, "q"), (content.k, "k"))
    )
    return q @ k.T / (encoding.feature_dim * HEAD_DIM) ** 0.5


def relative_error(estimate: Tensor, exact: Tensor) -> float:
    """Return the norm of the difference, divided by the norm of the exact values."""
    return ((estimate - exact).norm() / exact.norm()).item()


def show(axis: Axes, values: Tensor, limit: float, title: str = "") -> None:
    """Draw a matrix: red is negative, white 0, blue positive, darkest from `limit` on."""
    colors = {"cmap": "RdBu", "vmin": -limit, "vmax": limit}
    axis.imshow(values.numpy(), interpolation="antialiased", **colors)
    axis.set(xticks=[], yticks=[])
    axis.set_title(title, fontsize=9, pad=4)


def limit_of(values: Tensor) -> float:
    """Return the 99 % quantile of the absolute values.

    The maximum often belongs to the diagonal and would make the rest pale.
    """
    return values.abs().quantile(0.99).item()


def draw_contexts(figure: SubFigure, piece: pieces.Piece) -> None:
    """Draw closed form and estimate: a row for each prior, and one with notes as content."""
    positions, notes = positions_of(piece), content_of(piece)
    ones = torch.ones(len(piece), HEAD_DIM, dtype=torch.float64)
    rows = {f"{prior}\n{what}": (prior, Content(ones, ones)) for prior, what in PRIORS.items()}
    rows["BIN\n× notes as\ncontent"] = "BIN", notes
    edges = {"left": 0.09, "right": 0.995, "top": 0.9, "bottom": 0.015}
    grid = figure.add_gridspec(len(rows), len(ENCODINGS), wspace=0.068, hspace=0.077, **edges)
    for j, name in enumerate(ENCODINGS):
        encodings = {prior: make(name, 12 if prior == "BIN" else 1) for prior in PRIORS}
        for i, (label, (prior, content)) in enumerate(rows.items()):
            encoding, at = encodings[prior], positions[prior]
            exact = scores(encoding, at, content)
            estimate = scores_from_features(encoding, at, content)
            left, right = grid[i, j].subgridspec(1, 2, wspace=0.04).subplots()
            titles = (f"{name}\nclosed form", "\nfrom features") if i == 0 else ("", "")
            show(left, exact, limit_of(exact), titles[0])
            show(right, estimate, limit_of(exact), titles[1])
            what = f"{prior} x notes" if content is notes else prior
            print(f"{name:24} {what:12} off by {relative_error(estimate, exact):.1e}")
            if j == 0:
                left.set_ylabel(label, fontsize=9, rotation=0, ha="right", va="center")


def draw_product(figure: SubFigure, piece: pieces.Piece) -> None:
    """Draw content x context = score for one component, then the sum over components.

    The component is the one whose context varies most.
    """
    at, content = positions_of(piece)["BIN"], content_of(piece)
    with torch.no_grad():
        encoding = make(APART, 12)
        context = encoding.kernel(at[:, None], at[None])[:, :, 0].diagonal(dim1=-2, dim2=-1)
    d = int(context.var((0, 1)).argmax())
    products = content.q[:, None] * content.k[None]  # [T, T, D]
    shown = [
        (products[..., d], f"content of component {d}\n$q_{{md}}\\,k_{{nd}}$", "×"),
        (context[..., d], "context, BIN\n$G_d(s_m, s_n)$", "="),
        (products[..., d] * context[..., d], "score of the component\n$a^d_{mn}$", "$\\Sigma_d$"),
        ((products * context).sum(-1), "score\n$a_{mn}$", "beside"),
        (products.sum(-1), "score without context\n$q_m \\cdot k_n$", ""),
    ]
    edges = {"left": 0.12, "right": 0.965, "top": 0.83, "bottom": 0.03}
    axes = figure.subplots(1, len(shown), gridspec_kw={"wspace": 0.3, **edges})
    for axis, (values, title, sign) in zip(axes, shown, strict=True):
        show(axis, values, limit_of(values), title)
        size = 11 if len(sign) == 6 else 20
        axis.text(
            *(1.15, 0.5, sign), transform=axis.transAxes, ha="center", va="center", fontsize=size
        )
    axes[0].set_ylabel(f"{APART}\ncomes apart", fontsize=9, rotation=0, ha="right", va="center")


def main(arguments: list[str] | None = None) -> None:
    """Draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bars", type=int, default=12)
    parser.add_argument("--data", type=Path, help=".npz file of songs, default the prelude")
    parser.add_argument("--song", type=int, default=0, help="song of the file, from 0")
    parser.add_argument("--seed", type=int, default=0, help="seed for frequencies and noise")
    parser.add_argument("--out", type=Path, default=Path("docs/kernels.png"), help="output, a .png")
    args = parser.parse_args(arguments)
    torch.manual_seed(args.seed)
    try:
        piece = pieces.load(args.data, args.song).tile(STEPS * args.bars)
    except ValueError as error:
        parser.error(str(error))
    figure = Figure(figsize=(15.5, 10.8))
    figure.suptitle(
        f"{piece.name}, {args.bars} bars: how much a query (down) sees of a key (across)",
        y=0.985,
        parse_math=False,
    )
    above, below = figure.subfigures(2, 1, height_ratios=(8, 2.8))
    draw_contexts(above, piece)
    draw_product(below, piece)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=80)
    # a palette of 256 colours takes a third of the bytes
    Image.open(drawn).convert("RGB").quantize(dither=Image.Dither.NONE).save(args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
