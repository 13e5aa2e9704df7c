"""Generate melodies with a small model of fastpe layers, at a time and memory a token that stay.

    python examples/generate.py [--tokens 64] [--temperature 0.8] [--top-k 5] [--save STATE]
    python examples/generate.py --resume STATE

Two layers learn for a few seconds to arpeggiate a chord progression in three keys. Prompts of
different lengths are read as one batch; then each token costs one step on the states of the layers.
--save keeps the model and the states in a file, --resume goes on from there as if nothing had
happened.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastpe

NOTES = ["C", "C#", "D", "D#", "E", "F", "F#", "G", "G#", "A", "A#", "B"]
PITCHES = 36
KEYS = (0, 4, 7)
# I vi IV V, each chord as its root, fifth, third, fifth
CHORDS = ((0, 4, 7), (9, 12, 16), (5, 9, 12), (7, 11, 14))
FIGURE = (0, 2, 1, 2)
States = list[fastpe.LinearAttentionState]


def melody(key: int, start: int, length: int) -> Tensor:
    """Return the pitches [length] of the progression in a key, from a step on."""
    notes = torch.tensor([chord[i] + key for chord in CHORDS for i in FIGURE])
    return notes[(start + torch.arange(length)) % len(notes)]


class Block(nn.Module):
    """Attention and two linear layers, each on what is normalised and added."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        encoding = fastpe.RoPE(dim // heads, heads)
        self.attention = fastpe.nn.CausalLinearAttention(dim, heads, pos_encoding=encoding)
        self.norm = nn.LayerNorm(dim)
        self.rest = nn.Sequential(
            nn.LayerNorm(dim), nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim)
        )

    def forward(
        self, x: Tensor, padding: Tensor | None
    ) -> tuple[Tensor, fastpe.LinearAttentionState]:
        """Return y [B, T, dim] for x [B, T, dim] and the state after the last token."""
        y, state = self.attention(self.norm(x), key_padding_mask=padding, output_final_state=True)
        x = x + y
        return x + self.rest(x), state

    def step(
        self, x: Tensor, state: fastpe.LinearAttentionState
    ) -> tuple[Tensor, fastpe.LinearAttentionState]:
        """Return y [B, dim] for one more token x [B, dim], and the state after it."""
        y, state = self.attention.step(self.norm(x), state)
        x = x + y
        return x + self.rest(x), state


class Model(nn.Module):
    """A decoder-only model of pitches."""

    def __init__(self, dim: int = 64, heads: int = 4, layers: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(PITCHES, dim)
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(layers))
        self.head = nn.Linear(dim, PITCHES)

    def forward(self, tokens: Tensor, padding: Tensor | None = None) -> tuple[Tensor, States]:
        """Return logits [B, T, PITCHES] and the states of the layers, tokens and padding [B, T]."""
        x, states = self.embedding(tokens), []
        for block in self.blocks:
            x, state = block(x, padding)
            states.append(state)
        return self.head(x), states

    def step(self, tokens: Tensor, states: States) -> tuple[Tensor, States]:
        """Return logits [B, PITCHES] after one more token [B] of each sequence, and the states."""
        x, after = self.embedding(tokens), []
        for block, state in zip(self.blocks, states, strict=True):
            x, state = block.step(x, state)
            after.append(state)
        return self.head(x), after


def train(model: Model, steps: int, length: int = 48) -> float:
    """Learn melodies of all keys from random steps on; return the last loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    loss = torch.tensor(0.0)
    for _ in range(steps):
        starts = torch.randint(16, (4, len(KEYS))).tolist()
        pieces = [melody(*at, length + 1) for row in starts for at in zip(KEYS, row, strict=True)]
        tokens = torch.stack(pieces)
        logits, _ = model(tokens[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


@torch.no_grad()
def prefill(model: Model, prompts: list[Tensor]) -> tuple[Tensor, States]:
    """Return the logits [B, PITCHES] after prompts of any lengths, and the states."""
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    tokens = nn.utils.rnn.pad_sequence(prompts, batch_first=True)
    padding = torch.arange(tokens.shape[1]) >= lengths[:, None]
    logits, states = model(tokens, padding)
    return logits[torch.arange(len(prompts)), lengths - 1], states


def sample(logits: Tensor, temperature: float, top_k: int) -> Tensor:
    """Return a token [B] for logits [B, PITCHES], of the top_k likeliest; at 0 the likeliest."""
    if temperature == 0:
        return logits.argmax(-1)
    best, tokens = logits.topk(top_k)
    chosen = (best / temperature).softmax(-1).multinomial(1)
    return tokens.gather(-1, chosen).squeeze(-1)


@torch.no_grad()
def generate(
    model: Model, logits: Tensor, states: States, count: int, temperature: float, top_k: int
) -> tuple[Tensor, Tensor, States]:
    """Return `count` tokens [B, count], and the logits and states to go on from."""
    tokens = []
    for _ in range(count):
        tokens.append(sample(logits, temperature, top_k))
        logits, states = model.step(tokens[-1], states)
    return torch.stack(tokens, 1), logits, states


def main(argv: list[str] | None = None) -> None:
    """Train or resume, generate, print, and save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=64, help="to generate for each prompt")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest")
    parser.add_argument("--top-k", type=int, default=5)
    parser.add_argument("--steps", type=int, default=150, help="of training")
    parser.add_argument("--save", help="file for the model and its states")
    parser.add_argument("--resume", help="such a file")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    model = Model()
    if args.resume:
        saved = torch.load(args.resume, weights_only=True)
        model.load_state_dict(saved["model"])
        logits, states = saved["logits"], saved["states"]
    else:
        print(f"trained: loss {train(model, args.steps):.3f}")
        prompts = [melody(key, 0, length) for key, length in zip(KEYS, (8, 13, 20), strict=True)]
        logits, states = prefill(model, prompts)
    start = time.perf_counter()
    tokens, logits, states = generate(
        model, logits, states, args.tokens, args.temperature, args.top_k
    )
    seconds = time.perf_counter() - start
    for row in tokens:
        print(" ".join(NOTES[pitch % 12] for pitch in row))
    size = sum(x.nbytes for state in states for x in (state.s, state.z))
    print(
        f"{tokens.numel() / seconds:.0f} tokens/s; states of {size / 1e3:.0f} KB after "
        f"{states[0].length.tolist()} tokens, as after one"
    )
    if args.save:
        torch.save({"model": model.state_dict(), "logits": logits, "states": states}, args.save)


if __name__ == "__main__":
    main()
