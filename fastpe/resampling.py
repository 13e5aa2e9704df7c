"""When noise is redrawn: what random encodings and random feature maps have in common."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .ops import count_forward


class Resampled(nn.Module):
    """Noise that is a function of (seed, step), both in the state dict.

    It is fixed in evaluation, and in training redrawn at every `resample`-th forward; activation
    checkpointing gets the same noise again. A subclass names it first among its bases, calls
    `_init_noise`, defines `_draw`, and asks `_noise` for what that returns.
    """

    module_id = 0

    def _init_noise(self, resample: str | int, seed: int | None, *, random: bool = True) -> None:
        """Check and keep the policy; make the buffers if there is noise."""
        if seed is not None and (type(seed) is not int or not -(2**63) <= seed < 2**63):
            raise ValueError(f"seed must be an int of 64 bits, got {seed!r}")
        every = {"forward": 1, "never": 0}.get(resample, resample)
        if isinstance(every, bool) or not isinstance(every, int) or every < 0 or resample == 0:
            raise ValueError(
                f"resample must be 'forward', 'never' or a positive int, got {resample!r}"
            )
        self.resample, self._every, self._random = resample, every, random
        if random:
            seed = _random_int() if seed is None else seed
            self.register_buffer("seed", torch.tensor(seed, dtype=torch.int64))
            # counts training forwards; the noise changes with step // every
            self.register_buffer("step", torch.tensor(0, dtype=torch.int64))
        # {token: (step, whether a backward has asked for it)}
        self._steps_drawn: dict[int, tuple[Tensor | None, bool]] = {}
        self._newest: Tensor | None = None
        self._cache: tuple | None = None
        self._key: tuple | None = None

    def _noise_source(self) -> Resampled:
        # the module that holds seed and step; another one where they are shared
        return self

    def _draw(self, *wanted: object) -> Tensor:
        raise NotImplementedError

    def _noise(self, *wanted: object) -> Tensor:
        """Return what `_draw` makes of these arguments, kept as long as the noise lasts."""
        if torch.compiler.is_compiling():
            return self._draw(*wanted)
        # read and written in one piece: another thread may put its own there
        key, cache = self.noise_key, self._cache
        if cache is None or cache[0] is not key or cache[1] != wanted:
            with torch.inference_mode(False), torch.no_grad():
                self._cache = cache = key, wanted, self._draw(*wanted)
        return cache[2]

    @property
    def noise_key(self) -> Tensor | None:
        """The (seed, step) in use, int64 [2]; None without noise."""
        source = self._noise_source()
        if not source._random:
            return None
        every = max(source._every, 1)
        if torch.compiler.is_compiling():
            return torch.stack((source.seed, source.step // every))
        # one tensor as long as the noise lasts: a state that has it needs no look at its values
        stamp, key = (_stamp(source.seed), _stamp(source.step)), source._key
        if key is None or key[0] != stamp:
            with torch.inference_mode(False):
                source._key = key = stamp, torch.stack((source.seed, source.step // every))
        return key[1]

    def resample_(self) -> None:
        """Draw new noise (and go on from there)."""
        source = self._noise_source()
        if not source._random:
            return
        every = max(source._every, 1)
        source.step.copy_((source.step // every + 1) * every)

    def maybe_resample_(self) -> None:
        """Count a training forward, which redraws the noise where `resample` says so."""
        source = self._noise_source()
        if not self.training or not source._every or not source._random:
            return
        if torch.compiler.is_compiling():
            if source is self:
                count_forward(self.step)
            return
        # activation checkpointing restores torch's generator before it runs a forward again: the
        # token is then the same, and tells which noise to use again
        token = _random_int()
        if torch._C._current_graph_task_id() != -1:
            step, _ = self._steps_drawn.get(token, (None, True))
            source._reuse(step)
            self._steps_drawn[token] = step, True
            return
        if source._newest is not None:
            source._restore()  # the last backward failed before it could
        if source is self:
            self.step.add_(1)
        # a copy, since a look at its value would wait for the card that it is on
        step = source.step.clone()
        before, used = self._steps_drawn.get(token, (step, True))
        # None: which of two forwards from the same state of the generator it was, is not known
        self._steps_drawn[token] = step if used or torch.equal(before, step) else None, False
        if len(self._steps_drawn) > 1024:
            del self._steps_drawn[next(iter(self._steps_drawn))]

    def _reuse(self, step: Tensor | None) -> None:
        if step is None:
            raise RuntimeError(
                "a forward was run again inside backward with another state of torch's generator, "
                "or with one that several forwards began with, so its noise is lost: use "
                "checkpoint(..., preserve_rng_state=True), and seed the generator once"
            )
        if self._newest is None:
            # in use again when this backward is done
            self._newest = self.step.clone()
            torch.autograd.Variable._execution_engine.queue_callback(self._restore)
        self.step.copy_(step)

    def _restore(self) -> None:
        self.step.copy_(self._newest)
        self._newest = None

    def __getstate__(self) -> dict[str, object]:
        """Return what is copied and pickled: not what can be made again."""
        made = {"_cache": None, "_key": None, "_steps_drawn": {}, "_newest": None}
        return super().__getstate__() | made

    def _load_from_state_dict(self, *args: object, **kwargs: object) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._steps_drawn.clear()


def _random_int() -> int:
    return int(torch.randint(2**62, (), device="cpu"))


def _stamp(x: Tensor) -> object:
    # the value of a scalar; where a look at it would wait, or is not possible, what tells a change
    if type(x) is Tensor and x.device.type == "cpu" and not torch._C._len_torch_dispatch_stack():
        return x.item()
    return id(x), None if x.is_inference() else x._version
