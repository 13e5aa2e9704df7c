"""The seed and step of noise, and when it is redrawn, for encodings and feature maps."""

from __future__ import annotations

import ctypes
import sys
import weakref
from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from .. import _torch
from .._torch import observed
from ..ops.noise import count_forward

# the code of n is 16 n + 8: averaging equal codes rounds them by less than 8
_UNIT = 16


class Resampled(nn.Module):
    """Noise that is a function of (seed, step), both in the state dict.

    Evaluation fixes the noise; training redraws it at every `resample`-th forward. A forward that
    activation checkpointing runs again gets the noise it had (see `_Recomputed`). A copy of the
    module has the noise of the original; `reseed_` gives it other noise.

    A subclass names this class first among its bases, calls `_init_noise`, defines `_draw`, calls
    `_reset_noise` in its `reset_parameters`, and gets its numbers from `_noise`.

    The buffers are `seed_code`, int64 [2, 8], the upper and lower halves of the seed's bytes, and
    `step_code`, int64 []. Averaging equal codes over modules leaves their numbers the same.
    """

    module_id = 0

    def _init_noise(self, resample: str | int, seed: int | None, *, random: bool = True) -> None:
        """Check and store the policy; register the buffers if there is noise."""
        _check_seed(seed)
        every = {"forward": 1, "never": 0}.get(resample, resample)
        if isinstance(every, bool) or not isinstance(every, int) or every < 0 or resample == 0:
            raise ValueError(
                f"resample must be 'forward', 'never' or a positive int, got {resample!r}"
            )
        self.resample, self._every, self._random = resample, every, random
        self._given_seed = seed
        if random:
            self.register_buffer("seed_code", torch.empty(2, 8, dtype=torch.int64))
            # counts training forwards; the noise changes with step // every
            self.register_buffer("step_code", torch.empty((), dtype=torch.int64))
        self._forwards = _Recomputed()
        self._newest: Tensor | None = None
        self._cache: tuple | None = None
        self._key: tuple | None = None
        self._known: tuple = (None, None)

    def _noise_source(self) -> Resampled:
        # the module that holds seed and step; a share returns its source
        return self

    def _draw(self, *wanted: object) -> Tensor:
        raise NotImplementedError

    def _noise(self, *wanted: object) -> Tensor:
        """Return `_draw(*wanted)`, cached until the noise changes."""
        if observed():
            return self._draw(*wanted)
        # read once and assign once: other threads write here too
        key, cache = self.noise_key, self._cache
        if cache is None or cache[0] is not key or cache[1] != wanted:
            with torch.inference_mode(False), torch.no_grad():
                self._cache = cache = key, wanted, self._draw(*wanted)
        return cache[2]

    def _lasting(self, make: Callable[[], tuple], device: torch.device | None) -> tuple:
        """Return the result of `make`, kept while its inputs, the noise and the device last.

        Decoding asks for the same position maps at every token, and they cost more than the token.
        It is made anew if it would be recorded, or if inputs are on a GPU, which a look waits for.
        The bytes of inputs are compared: versions do not count what `.data` or FSDP2 writes.
        """
        if torch.is_grad_enabled() or observed():
            return make()
        inputs, noise = self.map_inputs(), self.noise_key
        if not all(x.is_cpu and x.is_contiguous() and not x.is_neg() for x in inputs):
            return make()
        contents = [ctypes.string_at(x.data_ptr(), x.nbytes) for x in inputs]
        key = device, id(noise), [x.dtype for x in inputs], contents
        # read and written in one piece: another thread may put its own there
        known = self._known
        if known[0] != key:
            with torch.inference_mode(False), torch.no_grad():
                # the noise is kept, so that its id remains its own
                self._known = known = key, make(), noise
        return known[1]

    @property
    def seed(self) -> int | None:
        """The seed in use; None without noise."""
        source = self._noise_source()
        return int(_decoded(source.seed_code)) if source._random else None

    @property
    def step(self) -> int | None:
        """Training forwards counted so far, plus those that `resample_` skipped."""
        source = self._noise_source()
        return int(source.step_code) // _UNIT if source._random else None

    @property
    def noise_key(self) -> Tensor | None:
        """The (seed, step) in use, int64 [2]; None without noise."""
        source = self._noise_source()
        if not source._random:
            return None
        if source._newest is not None and _torch.backward_number() == -1:
            source._restore()  # the last backward failed, or this torch has no `after_backward`
        if observed():
            return source._made_key(_decoded(source.seed_code))
        # return the same tensor until the noise changes: states are then compared by identity
        codes, known = (source.seed_code, source.step_code), source._key
        stamps = _stamp(codes[0]), _stamp(codes[1])
        if known is None or known[0] != stamps:
            with torch.inference_mode(False), torch.no_grad():
                same = known is not None and known[0][0] == stamps[0]
                seed = known[2] if same else _decoded(codes[0])
                # keep the codes, so that no other tensors get their ids
                source._key = known = stamps, source._made_key(seed), seed, codes
        return known[1]

    def _made_key(self, seed: Tensor) -> Tensor:
        return torch.stack((seed, self.step_code // (_UNIT * max(self._every, 1))))

    def reseed_(self, seed: int | None = None) -> None:
        """Take a 64-bit seed, by default from torch's generator, and restart the step at 0."""
        _check_seed(seed)
        source = self._noise_source()
        source._given_seed = seed
        source._reset_noise()

    def _reset_noise(self) -> None:
        # use the given seed or draw one; a share has no buffers and leaves this to its source
        if "seed_code" not in self._buffers:
            return
        if self._given_seed is None:
            seed = torch.randint(2**62, (), device="cpu")
        else:
            seed = torch.tensor(self._given_seed, dtype=torch.int64, device="cpu")
        with torch.no_grad():
            self.seed_code.copy_(_coded(seed))
            self.step_code.fill_(_UNIT // 2)
        self._forget()

    def _forget(self) -> None:
        self._forwards, self._newest = _Recomputed(), None

    def resample_(self) -> None:
        """Redraw the noise now; later steps continue from here."""
        source = self._noise_source()
        if not source._random:
            return
        every = _UNIT * max(source._every, 1)
        source.step_code.copy_((source.step_code // every + 1) * every + _UNIT // 2)

    def maybe_resample_(self) -> None:
        """Count a training forward and redraw the noise if it is due; layers call this."""
        source = self._noise_source()
        if not self.training or not source._every or not source._random:
            return
        if torch.compiler.is_compiling():
            if source is self:
                count_forward(self.step_code, _UNIT)
            return
        token = torch.randint(2**62, (), device="cpu")
        in_backward = _torch.backward_number() != -1
        if type(token) is not Tensor:  # fake
            if source is self and not in_backward:
                self.step_code.add_(_UNIT)
            return
        if in_backward:
            source._reuse(self._forwards.recall(int(token)))
            return
        if source._newest is not None:
            source._restore()  # the last backward raised before it did
        if source is self:
            self.step_code.add_(_UNIT)
        self._forwards.remember(int(token), source.step_code)

    def _reuse(self, step_code: Tensor) -> None:
        if self._newest is None:
            # restore the newest step when this backward ends
            self._newest = self.step_code.clone()
            _torch.after_backward(self._restore)
        self.step_code.copy_(step_code)

    def _restore(self) -> None:
        self.step_code.copy_(self._newest)
        self._newest = None

    def __getstate__(self) -> dict[str, object]:
        """Leave caches out of copies and pickles."""
        made = {"_cache": None, "_key": None, "_newest": None, "_known": (None, None)}
        return super().__getstate__() | made

    def _load_from_state_dict(
        self, state_dict: dict[str, object], prefix: str, *args: object
    ) -> None:
        # state dicts from before codes hold plain numbers
        for name, coded in (("seed", _coded), ("step", lambda step: step * _UNIT + _UNIT // 2)):
            if f"{name}_code" in self._buffers and prefix + name in state_dict:
                number = torch.as_tensor(state_dict.pop(prefix + name)).long()
                state_dict[f"{prefix}{name}_code"] = coded(number)
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._forget()


class _Recomputed:
    """The steps of the forwards that activation checkpointing may run again.

    Every training forward draws a token from torch's generator. Checkpointing restores the
    generator before it runs a forward again, so the token is the same and identifies the forward.
    The step itself is not drawn: ranks have different generators but need the same noise.

    The checkpoint owns the record of a forward (`_checkpoints`); this register refers to it weakly.
    So any number of forwards may precede a backward, and records vanish once they cannot be used.
    The register owns the newest record, in case something other than a checkpoint runs it again.
    """

    def __init__(self) -> None:
        self._known: weakref.WeakValueDictionary[int, _Record] = weakref.WeakValueDictionary()
        self._newest: _Record | None = None
        # only with a torch that does not tell which checkpoint a forward belongs to
        self._kept: deque[_Record] = deque(maxlen=4096)

    def __reduce__(self) -> tuple[type, tuple]:
        # a copy knows no forwards
        return _Recomputed, ()

    def remember(self, token: int, step_code: Tensor) -> None:
        """Record that the forward with this token used the noise of this step."""
        self._newest = None
        known = self._known.get(token)
        # clone: reading the value would synchronise with the GPU
        record = _Record(step_code.clone())
        if known is not None and not known.used and not known.agrees(record):
            # two forwards with one token but different noise cannot be told apart
            known.step_code = record.step_code = None
        self._known[token] = self._newest = record
        if _torch.MISSING:
            self._kept.append(record)
        for holder in _checkpoints():
            holder.__dict__.setdefault("_fastpe_records", []).append(record)

    def recall(self, token: int) -> Tensor:
        """Return the step of the forward with this token."""
        record = self._known.get(token)
        if record is None:
            raise RuntimeError(
                "a forward with noise ran inside backward from a state of torch's generator that "
                "no forward before began with, so its noise is unknown: use "
                "torch.utils.checkpoint with preserve_rng_state=True"
            )
        if record.step_code is None:
            raise RuntimeError(
                "a forward with noise ran again inside backward, but several forwards began with "
                "its state of torch's generator, so its noise is unknown: do not seed the "
                "generator between a checkpointed forward and its backward"
            )
        record.used = True
        return record.step_code


class _Record:
    """The step of one forward; None if unknown."""

    def __init__(self, step_code: Tensor) -> None:
        self.step_code: Tensor | None = step_code
        # True: a backward has asked for the step
        self.used = False

    def agrees(self, other: _Record) -> bool:
        return self.step_code is not None and torch.equal(self.step_code, other.step_code)


def _checkpoints() -> list[object]:
    """Return objects that live as long as a checkpoint may run this forward again.

    A non-reentrant checkpoint has an unpack hook, which every saved tensor holds. Other unpack
    hooks, for instance those that move tensors to the CPU, may live for ever. A reentrant
    checkpoint is an autograd Function, whose context the graph holds.
    """
    found = []
    hooks = _torch.saved_tensors_hooks(False)
    if hooks is not None and "checkpoint" in (getattr(hooks[1], "__module__", None) or ""):
        found.append(hooks[1])
    if torch.is_grad_enabled():
        return found
    frame = sys._getframe()
    while frame is not None:
        code = frame.f_code
        if code.co_name == "forward" and code.co_varnames[:1] == ("ctx",):
            context = frame.f_locals.get("ctx")
            found += [context] if isinstance(context, FunctionCtx) else []
        frame = frame.f_back
    return found


def _check_seed(seed: int | None) -> None:
    if seed is not None and (type(seed) is not int or not -(2**63) <= seed < 2**63):
        raise ValueError(f"seed must be an int of 64 bits, got {seed!r}")


def _coded(number: Tensor) -> Tensor:  # int64 [], to [2, 8]
    octets = number.reshape(1).view(torch.uint8).long()
    return torch.stack((octets >> 4, octets & 15)) * _UNIT + _UNIT // 2


def _decoded(code: Tensor) -> Tensor:  # int64 [2, 8], to []
    high, low = (code // _UNIT).unbind()
    return (high << 4 | low).to(torch.uint8).view(torch.int64)[0]


def _stamp(x: Tensor) -> object:
    """Return a value that changes with x: its bytes on a CPU, elsewhere its version."""
    if type(x) is Tensor and x.is_cpu and x.is_contiguous():
        return ctypes.string_at(x.data_ptr(), x.nbytes)
    # inference tensors count no versions: never equal
    return object() if x.is_inference() else (id(x), x._version)
