"""Train a model of audio tokens with musical structure, from labels in seconds.

    python examples/codec_tokens.py [--out folder] [--steps 60] [--seed 0]
    python examples/codec_tokens.py --tokens codes.npy --frame-rate 75 --labels chords.json

Without --tokens the script makes its own files from Bach's Prelude in C:

* sound.wav is the rendered piece.
* tokens.npy has 4 tokens a frame at 50 frames a second. Residual k-means on band energies makes
  them; it is not a neural codec.
* chords.json has the chords in seconds, as pitch classes.

From there on it treats its files and yours alike. It reads tokens and labels, finds the label of
each frame, and trains a small model to predict a frame's tokens from the frames before. It trains
one model for each encoding. F-StrIPE and RoPEPool have the chords as positions. The last row has no
encoding and the chords as an input.

The table shows the cross-entropy in nats a token for each codebook, on the last third of the piece,
which is held out. One piece is little to learn from: the best row changes with the seed, and long
training makes every row worse.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastpe
from fastpe_lab import corpus, pieces

from music import codec, sound

FRAME_RATE, CODEBOOKS, ENTRIES = 50, 4, 64
# seconds a sixteenth, at 72 quarters a minute; a bar is then no whole number of frames
STEP, BAR = Fraction(60, 72 * 4), 16
HEAD_DIM, HEADS, LAYERS = 16, 4, 2
WINDOW, BATCH, HELD_OUT = 512, 2, 1 / 3
ROWS = ("none", "RoPE, time", "F-StrIPE, chords", "RoPEPool, chords", "none, chords as input")


def make_files(folder: Path, bars: int | None = None, seed: int = 0) -> None:
    """Write sound.wav, tokens.npy and chords.json of the prelude, or of its first bars.

    The codebooks are learned from the first two thirds, which are not held out.
    """
    piece = pieces.load()
    piece = piece if bars is None else piece.tile(bars * BAR)
    notes = sound.notes_of(piece.roll, piece.onset)
    samples = sound.render(notes, len(piece), float(STEP))
    frames = sound.band_energies(samples, FRAME_RATE)
    known = frames[: _held_out_from(len(frames))]
    quantiser = sound.ResidualKMeans(known, CODEBOOKS, ENTRIES, seed)
    ids = quantiser.encode(frames)
    print(f"{len(samples) / sound.SAMPLE_RATE:.1f} s, {len(ids)} frames of {CODEBOOKS} tokens")
    unseen, rest = frames[len(known) :], ids[len(known) :]
    for count in range(1, CODEBOOKS + 1):
        error = quantiser.decode(rest[:, :count]) - unseen
        kept = 1 - np.square(error).sum() / np.square(unseen - known.mean(0)).sum()
        print(f"  {count} codebooks keep {kept:.1%} of the variance of the held-out frames")
    chords = [
        {"start": float(a * STEP), "end": float(b * STEP), "label": piece.chroma[a].tolist()}
        for a, b in corpus.runs(piece.chroma)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    sound.save_wav(folder / "sound.wav", samples)
    np.save(folder / "tokens.npy", ids)
    (folder / "chords.json").write_text(json.dumps(chords))


class Model(nn.Module):
    """A causal model of token frames: two layers of causal linear attention.

    Args:
        sizes: Number of entries of each codebook.
        encoding: Function that makes the encoding of a layer, or None for no encoding.
        num_inputs: Size L of positions that the model gets as input, or 0.
    """

    def __init__(
        self,
        sizes: list[int],
        encoding: Callable[[], fastpe.PositionalEncoding] | None = None,
        num_inputs: int = 0,
    ) -> None:
        super().__init__()
        dim = HEADS * HEAD_DIM
        # one more entry stands for the frame before the first
        self.embeddings = nn.ModuleList(nn.Embedding(size + 1, dim) for size in sizes)
        self.inputs = nn.Linear(num_inputs, dim, bias=False) if num_inputs else None
        self.layers = nn.ModuleList()
        for _ in range(LAYERS):
            pos = None if encoding is None else encoding()
            attention = fastpe.nn.CausalLinearAttention(dim, HEADS, pos_encoding=pos)
            rest = nn.Sequential(
                nn.LayerNorm(dim), nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim)
            )
            self.layers.append(nn.ModuleList((nn.LayerNorm(dim), attention, rest)))
        self.heads = nn.ModuleList(nn.Linear(dim, size) for size in sizes)

    def forward(self, ids: Tensor, positions: Tensor | None, inputs: Tensor | None) -> list[Tensor]:
        """Return logits [B, T, size] for each codebook: each frame is predicted from earlier ones.

        Args:
            ids: Tokens, [B, T, num_codebooks].
            positions: Positions of the predicted frames, [B, T, L], or None for time.
            inputs: Inputs [B, T, num_inputs], or None.
        """
        before = F.pad(ids[:, :-1], (0, 0, 1, 0), value=-1) + 1
        x = sum(embed(before[..., i]) for i, embed in enumerate(self.embeddings))
        x = x if self.inputs is None else x + self.inputs(inputs)
        for norm, attention, rest in self.layers:
            x = x + attention(norm(x), positions=positions)
            x = x + rest(x)
        return [head(x) for head in self.heads]

    def losses(self, ids: Tensor, positions: Tensor | None, inputs: Tensor | None) -> Tensor:
        """Return the mean cross-entropy of each codebook, in nats."""
        logits = self(ids, positions, inputs)
        return torch.stack(
            [F.cross_entropy(x.flatten(0, 1), ids[..., i].flatten()) for i, x in enumerate(logits)]
        )


def make_model(row: str, sizes: list[int], levels: int) -> Model:
    """Return the model of a row; a position has `levels` numbers."""

    def spread(encoding: fastpe.PositionalEncoding) -> fastpe.PositionalEncoding:
        # the default frequencies are for positions that count up: pitch classes, 0 or 1, would
        # hardly change the phase
        with torch.no_grad():
            for parameter in (getattr(encoding, name, None) for name in ("freqs", "theta")):
                if parameter is not None:
                    parameter.normal_()
        return encoding

    made = {
        "RoPE, time": lambda: fastpe.RoPE(HEAD_DIM, HEADS),
        "F-StrIPE, chords": lambda: spread(fastpe.FStripe(HEAD_DIM, HEADS, num_levels=levels)),
        "RoPEPool, chords": lambda: spread(fastpe.RoPEPool(HEAD_DIM, HEADS, num_levels=levels)),
    }
    return Model(sizes, made.get(row), levels if row.endswith("as input") else 0)


def train(row: str, ids: Tensor, positions: Tensor, steps: int, seed: int) -> Tensor:
    """Train a row's model on the first two thirds; return the losses on the last third.

    Args:
        row: One of ROWS.
        ids: Tokens, [T, num_codebooks], with T at least 3.
        positions: Positions, [T, L], float64.
        steps: Number of training steps.
        seed: Seed for the model and its batches.
    Returns:
        The loss of each codebook, [num_codebooks].
    """
    torch.manual_seed(seed)
    model = make_model(row, (ids.max(0).values + 1).tolist(), positions.shape[1])
    structure = "chords" in row and "as input" not in row
    end = _held_out_from(len(ids))

    def batch(starts: Tensor, size: int) -> tuple[Tensor, Tensor | None, Tensor]:
        which = starts[:, None] + torch.arange(size)
        at = positions[which]
        return ids[which], at if structure else None, at.float()

    window = min(WINDOW, end, len(ids) - end)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    model.train()
    for _ in range(steps):
        loss = model.losses(*batch(torch.randint(end - window + 1, (BATCH,)), window)).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.eval()
    with torch.no_grad():
        return model.losses(*batch(torch.arange(end, len(ids) - window + 1, window), window))


def _held_out_from(num_frames: int) -> int:
    return num_frames - int(HELD_OUT * num_frames)


def main(arguments: list[str] | None = None) -> None:
    """Make tokens if none are given, train a model for each row, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=Path, help=".npy or .pt, [T, num_codebooks]")
    parser.add_argument("--frame-rate", type=float, default=FRAME_RATE, help="frames a second")
    parser.add_argument("--labels", type=Path, help=".json, a list of start, end and label")
    parser.add_argument("--out", type=Path, help="output folder, default a new one")
    parser.add_argument("--bars", type=int, help="bars of the prelude, default all 35")
    parser.add_argument("--steps", type=int, default=60, help="training steps for each row")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    if (args.tokens is None) != (args.labels is None):
        parser.error("--tokens and --labels go together")
    try:
        if args.tokens is None:
            out = args.out or Path(tempfile.mkdtemp(prefix="codec_tokens_"))
            make_files(out, args.bars, args.seed)
            print(f"wrote sound.wav, tokens.npy and chords.json to {out}")
            args.tokens, args.labels = out / "tokens.npy", out / "chords.json"
        tokens = codec.load_tokens(args.tokens, args.frame_rate)
        labels = codec.load_labels(args.labels)
        places = codec.positions_at_frames(labels, len(tokens.ids), tokens.frame_rate)
    except ValueError as error:
        parser.error(str(error))
    if len(tokens.ids) < 3:
        parser.error(f"tokens must have at least 3 frames, got {len(tokens.ids)}")
    ids = torch.from_numpy(tokens.ids)
    positions = torch.from_numpy(places).double().reshape(len(ids), -1)
    print(f"{len(labels)} labels, {len(positions.unique(dim=0))} different, on {len(ids)} frames")
    columns = "".join(f"{f'book {i + 1}':>9}" for i in range(ids.shape[1]))
    print(f"\nheld out, nats a token{columns}{'mean':>9}{'seconds':>9}")
    for row in ROWS:
        start = time.perf_counter()
        losses = train(row, ids, positions, args.steps, args.seed)
        cells = "".join(f"{x:9.3f}" for x in (*losses.tolist(), losses.mean().item()))
        print(f"{row:22}{cells}{time.perf_counter() - start:9.1f}", flush=True)


if __name__ == "__main__":
    # the work suits one thread; on a busy machine more threads wait for each other
    torch.set_num_threads(1)
    main()
