"""What a model is worth on songs it has not seen: nats, and the scores of the papers."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fastpe_lab.corpus import BAR

from . import metrics
from .model import Model, nats
from .windows import Windows, batched

# tokens of a batch, which bounds the memory
_TOKENS = 2048


@torch.no_grad()
def outputs_of(
    model: Model, windows: Windows, starts: list[tuple[int, int]], bars: int
) -> tuple[Tensor, Tensor]:
    """Return the logits of windows and their targets, [N, T, 2, 88] each."""
    model.eval()
    size = max(1, _TOKENS // (BAR * bars))
    logits, targets = [], []
    for i in range(0, len(starts), size):
        batch = batched([windows.window(*start, bars) for start in starts[i : i + size]])
        logits.append(model(batch.inputs, batch.positions)[0])
        targets.append(batch.target)
    return torch.cat(logits), torch.cat(targets)


def starts_of(windows: Windows, bars: int) -> list[tuple[int, int]]:
    """Return the windows side by side in every song.

    Raises:
        ValueError: no song has as many bars.
    """
    starts = windows.starts(bars)
    if not starts:
        raise ValueError(f"a song of at least {bars} bars is needed, and there is none")
    return starts


def fit_threshold(model: Model, windows: Windows, bars: int, count: int = 64) -> float:
    """Return the probability above which as many keys sound as in the songs trained on.

    Args:
        model: Trained on the windows.
        windows: To train on.
        bars: number of bars in a window.
        count: Windows to look at, spread over the songs.
    """
    starts = starts_of(windows, bars)
    starts = [
        starts[i] for i in np.linspace(0, len(starts) - 1, min(count, len(starts))).astype(int)
    ]
    logits, target = (x[:, :, 0] for x in outputs_of(model, windows, starts, bars))
    probability, share = logits.sigmoid().flatten(), target.mean().item()
    return float(np.quantile(probability.numpy(), 1 - share))


def evaluate(model: Model, windows: Windows, bars: int, threshold: float) -> dict[str, float]:
    """Return means over windows of `bars` bars, side by side in every song.

    Args:
        model: To be evaluated.
        windows: windows of songs that the model has not seen.
        bars: number of bars in a window.
        threshold: Probability above which a key is said to sound, see `fit_threshold`.
    Returns:
        nll: Nats a sixteenth of the keys that sound (the headline), onset_nll: of these, of the
        ones that are struck. f1, chroma_similarity, grooving_similarity, note_density_distance,
        ssm_distance: of rolls by the threshold, see `metrics`. windows: Their number.

    Raises:
        ValueError: no song has as many bars.
    """
    logits, target = outputs_of(model, windows, starts_of(windows, bars), bars)
    sounding, struck = (x.mean().item() for x in nats(logits, target))
    said = logits[:, :, 0].sigmoid().numpy() > threshold
    truth = target[:, :, 0].numpy() > 0.5
    scores = [metrics.scores(a, b) for a, b in zip(said, truth, strict=True)]
    means = {name: float(np.mean([score[name] for score in scores])) for name in scores[0]}
    return {"nll": sounding, "onset_nll": struck, **means, "windows": len(target)}
