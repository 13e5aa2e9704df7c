"""Errors of attention by FAVOR+ with SineSPE, in two stages and in one stage on exact sines.

    python benchmarks/variance.py --features 64 256

All rows have the same number of features. The exact weights are exp(sum_d q_d k_d C_d(lag) /
sqrt(D)) in closed form.

    two stages               SPE's noise makes R features, from which FAVOR+ makes the final ones
    two stages, orthogonal   the same with orthogonal noise
    one stage                FAVOR+ projects SPE's sines themselves

Queries and keys are standard normal times --scale. Parameters are SPE's initial ones. Noise is
drawn --draws times. Prints the relative error of a weight (root mean square, median of its size,
mean) and the part of a normalised row of weights that is in the wrong place. Writes
DIR/variance.jsonl.
"""

from __future__ import annotations

import argparse
import math
import sys

import torch
from timing import command
from torch import Tensor

import fastpe
from fastpe.ops.position_map import encoded
from fastpe_lab.records import Setup, environment, markdown

MEASURES = ("rms", "median", "mean", "misplaced")


def exact_weights(encoding: fastpe.SineSPE, q: Tensor, k: Tensor) -> Tensor:
    """Return the weights in closed form, [T, T], for q and k [T, D]."""
    at = torch.arange(q.shape[0], dtype=torch.float64)
    c = encoding.kernel(at[:, None] - at)[:, :, 0].diagonal(dim1=-2, dim2=-1)
    return (torch.einsum("md,nd,mnd->mn", q, k, c) / q.shape[-1] ** 0.5).exp()


def estimated_weights(
    encoding: fastpe.SineSPE, psi: fastpe.Favor, q: Tensor, k: Tensor, backend: str
) -> Tensor:
    """Return the weights, [H, T, T], each head with a draw of its own."""
    length, heads = q.shape[0], encoding.num_heads
    positions = torch.arange(length, dtype=torch.float64).view(1, length, 1)
    features = []
    for x, position_map in zip((q, k), encoding.make_maps(), strict=True):
        x = x[None, :, None].expand(1, length, heads, x.shape[-1])
        if encoding.num_realizations is None:
            exponent, half_square = psi.exponents(x, positions, position_map, backend)
        else:
            exponent, half_square = psi.exponents(encoded(x, positions, position_map, backend))
        features.append((exponent - half_square).exp() / exponent.shape[-1] ** 0.5)
    return torch.einsum("bmhr,bnhr->hmn", *features)


def errors(found: Tensor, exact: Tensor) -> dict[str, float]:
    """Return the errors over all draws, all queries, and all keys up to the query."""
    seen = torch.ones_like(exact, dtype=torch.bool).tril()
    relative = (found / exact - 1)[:, seen]
    rows, exact_rows = (x.tril() / x.tril().sum(-1, keepdim=True) for x in (found, exact))
    return {
        "rms": relative.square().mean().sqrt().item(),
        "median": relative.abs().median().item(),
        "mean": relative.mean().item(),
        "misplaced": (rows - exact_rows).abs().sum(-1).mean().item() / 2,
    }


def stages(realizations: int) -> dict[str, dict]:
    """Return {row: options of SineSPE}."""
    two = {"num_realizations": realizations}
    rows = {"two stages": two, "two stages, orthogonal": two | {"noise": "orthogonal"}}
    return rows | {"one stage": {"num_realizations": None}}


def measure(args: argparse.Namespace, backend: str) -> list[dict]:
    """Return a record for each row and number of features."""
    torch.manual_seed(args.seed)
    shape = args.length, args.head_dim
    q, k = args.scale * torch.randn(2, *shape, dtype=torch.float64)
    exact = fastpe.SineSPE(args.head_dim, 1, num_sines=args.sines, num_realizations=None).double()
    wanted, records = exact_weights(exact, q, k), []
    for name, chosen in stages(args.realizations).items():
        # every head has the same parameters, but noise of its own
        encoding = fastpe.SineSPE(
            args.head_dim, args.draws, num_sines=args.sines, seed=args.seed, **chosen
        ).double()
        with torch.no_grad():
            for p, source in zip(encoding.parameters(), exact.parameters(), strict=True):
                p.copy_(source.expand_as(p))
        for features in args.features:
            psi = fastpe.Favor(features, seed=args.seed + 1)
            found = estimated_weights(encoding, psi, q, k, backend)
            records.append({"row": name, "features": features} | errors(found, wanted))
    return records


def main() -> int:
    """Run the benchmark; return 1 if an error is not finite."""
    parser = command.plain_parser(__doc__)
    parser.add_argument("--features", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--realizations", type=int, default=64, help="R, SPE's realisations")
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--sines", type=int, default=10)
    parser.add_argument("--scale", type=float, default=1.0, help="scale of queries and keys")
    parser.add_argument("--draws", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    setup = Setup(args.length, heads=args.draws, head_dim=args.head_dim, dtype="float64")
    about = environment(setup)
    with torch.no_grad():
        records = measure(args, about["backend"])
    chosen = {name: value for name, value in vars(args).items() if name not in ("out", "features")}
    lines = command.Lines(args.out / "variance.jsonl")
    for record in records:
        lines.write(about | chosen | record)
    table = [["features made in", "R", *MEASURES]]
    for r in records:
        numbers = (f"{r[name]:.3g}" for name in MEASURES)
        table.append([r["row"], str(r["features"]), *numbers])
    print(markdown(table))
    lost = [r for r in records if not all(math.isfinite(r[name]) for name in MEASURES)]
    for r in lost:
        print(f"error: {r['row']}, R = {r['features']}: not finite", file=sys.stderr)
    return int(bool(lost))


if __name__ == "__main__":
    sys.exit(main())
