"""Songs that a model goes on with: steps are one forward, files are no break, keys are chosen."""

import importlib
import json

import numpy as np
import pytest
import torch
from helpers import assert_within
from songs import corpus, save_songs, song_of_chords

for package in ("matplotlib", "tqdm"):
    pytest.importorskip(package, reason=f"{package} is not installed")
generate = importlib.import_module("generate")
attention, decoding, model, speed, windows = (
    importlib.import_module(f"music.{name}")
    for name in ("attention", "decoding", "model", "speed", "windows")
)

LINEAR = [
    ("none", "time", "favor"),
    ("rope", "time", "elu1"),
    ("ropepool", "bin", "favor"),
    ("spe", "rep", "favor"),
    ("fstripe", "time+bin", "favor"),
    ("fstripe-sff", "bin", "favor"),
    ("convspe", "time", "elu1"),
]
CONFIGS = [
    *(pytest.param({"pe": p, "prior": q, "feature_map": f}, id=p) for p, q, f in LINEAR),
    pytest.param({"attention": "softmax", "pe": "rope", "prior": "time"}, id="softmax"),
    pytest.param({"chords": True}, id="chords"),
]


def _pieces(bars=(1, 2), **options):
    config = model.Config(task="next", dim=16, heads=2, **options)
    torch.manual_seed(5)
    made = model.Model(config).double()
    if config.attention == "softmax":
        bars = (max(bars),) * len(bars)
    songs = [song_of_chords(seed, 2 + seed) for seed in range(len(bars))]
    return decoding.Pieces(made, songs, bars)


def _sampler(temperature=1.0):
    # untrained, every key has about one half: a few at a time
    return decoding.Sampler(0.5, temperature, 4, torch.Generator().manual_seed(3))


class Heard:
    """A sampler that keeps the logits."""

    def __init__(self):
        self.sampler, self.logits = _sampler(), []

    def __call__(self, logits, sounding):
        self.logits.append(logits)
        return self.sampler(logits, sounding)


@pytest.mark.parametrize("options", CONFIGS)
def test_steps_are_one_forward(options):
    """Past the songs' ends too, where their chords come again; prompts of any lengths at a time."""
    pieces, heard = _pieces(**options), Heard()
    pieces.go_on(5, heard)
    pieces.go_on(40, heard)
    logits = torch.stack(heard.logits, 1)
    config = pieces.model.config
    for song, roll, stepped in zip(pieces.songs, pieces.rolls, logits, strict=True):
        inputs = torch.cat((torch.zeros_like(roll[:1]), roll[:-1])).flatten(1).double()
        whole = decoding.joined([song], 5)
        if config.chords:
            chroma = np.tile(song.positions("bin"), (3, 1))[: len(roll)]
            inputs = torch.cat((inputs, torch.from_numpy(chroma).double()), 1)
        where = torch.from_numpy(windows.positions_of(whole, config.prior))[: len(roll)]
        with torch.no_grad():
            wanted = pieces.model(inputs[None], where[None])[0][0]
        assert_within(stepped, wanted[-45:], 1e-11)


@pytest.mark.parametrize("temperature", [0, 0.8])
@pytest.mark.parametrize("attention", ["linear", "softmax"])
def test_two_runs_through_a_file_are_one(tmp_path, attention, temperature):
    options = (
        {} if attention == "linear" else {"attention": "softmax", "pe": "none", "prior": "time"}
    )
    once, sampler = _pieces(**options), _sampler(temperature)
    once.go_on(24, sampler)
    first, sampler = _pieces(**options), _sampler(temperature)
    first.go_on(10, sampler)
    generate.save(tmp_path / "state.pt", first, sampler, [1, 2])
    args = generate.parse(["--resume", str(tmp_path / "state.pt"), "--top-k", "4"])
    args.temperature = temperature
    second, sampler, prompt_bars = generate.resume(args)
    second.go_on(14, sampler)
    assert prompt_bars == [1, 2]
    for a, b in zip(once.rolls, second.rolls, strict=True):
        assert torch.equal(a, b)
    for a, b in zip(once.states, second.states, strict=True):
        for x, y in zip(a, b, strict=True):
            assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y


def test_only_the_cache_grows(monkeypatch):
    monkeypatch.setattr(attention, "_ROOM", 8)
    linear, softmax = _pieces(), _pieces(attention="softmax", pe="rope", prior="time")
    of_linear, of_softmax = linear.state_bytes(), softmax.state_bytes()
    # two layers, keys and values, two pieces, 16 float64 a step
    assert of_softmax == 2 * 2 * 2 * 16 * 8 * 32
    for pieces in (linear, softmax):
        pieces.go_on(20, _sampler())
    assert linear.state_bytes() == of_linear
    assert softmax.state_bytes() == of_softmax * 52 // 32


def test_joined_songs_repeat():
    a, b = song_of_chords(0, 2), song_of_chords(1, 3)
    whole = decoding.joined([a, b], 9)
    assert whole.num_bars == 9
    for part, first in ((a, 0), (b, 2), (a, 5), (b.cut(0, 2), 7)):
        cut = whole.cut(first, part.num_bars)
        assert (cut.roll() == part.roll()).all()
        assert (cut.onsets() == part.onsets()).all()
        for name in ("root", "chroma", "phrase"):
            assert (getattr(cut, name) == getattr(part, name)).all()
    # time goes on
    assert (whole.positions("time") == np.arange(144)).all()


# the sampler


def _logits(probability, struck):
    return torch.tensor([probability, struck]).double().logit()[None]


def _choose(sampler, probability, struck, sounding):
    padding = [0.0] * (windows.KEYS - len(probability))
    logits = _logits([*probability, *padding], [*struck, *padding])
    before = torch.tensor([[*sounding, *padding]]).bool()
    found = sampler(logits, before)[0, :, : len(probability)]
    return found.int().tolist()


def test_threshold_and_top_k():
    probability, struck, before = [0.2, 0.3, 0.9, 0.5], [0.1, 0.1, 0.1, 0.6], [0, 0, 1, 1]
    sampler = decoding.Sampler(0.25, 0.0)
    # what did not sound is struck; what did, where it is likelier than not
    assert _choose(sampler, probability, struck, before) == [[0, 1, 1, 1], [0, 1, 0, 1]]
    sampler = decoding.Sampler(0.25, 0.0, top_k=2)
    assert _choose(sampler, probability, struck, before) == [[0, 0, 1, 1], [0, 0, 0, 1]]
    assert _choose(decoding.Sampler(0.95, 0.0), probability, struck, before) == [[0] * 4] * 2


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_temperature(temperature):
    """Shares of 20000 throws are within five standard deviations of the formula."""
    sampler = decoding.Sampler(0.2, temperature, generator=torch.Generator().manual_seed(0))
    logits = _logits([0.2] * 30 + [0.5] * 30 + [0.0] * 28, [0.3] * 88)
    count = 20000 // 30 + 1
    before = torch.ones(count, 88, dtype=torch.bool)
    found = sampler(logits.expand(count, -1, -1), before).double()
    odds = [0.25 * ratio ** (1 / temperature) for ratio in (1, 4)]
    for keys, odd in zip((slice(0, 30), slice(30, 60)), odds, strict=True):
        p, share = odd / (1 + odd), found[:, 0, keys].mean().item()
        assert abs(share - p) < 5 * (p * (1 - p) / (30 * count)) ** 0.5
    assert not found[:, 0, 60:].any()
    odd = (3 / 7) ** (1 / temperature)
    p, sounding = odd / (1 + odd), found[:, 0].sum().item()
    share = found[:, 1].sum().item() / sounding
    assert abs(share - p) < 5 * (p * (1 - p) / sounding) ** 0.5


@pytest.mark.parametrize("threshold", [0.0, 1.0])
def test_extreme_thresholds_stay_finite(threshold):
    sampler = decoding.Sampler(threshold, 0.0)
    assert _choose(sampler, [0.5], [0.5], [0])[0] == [1 - int(threshold)]


# what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "harmonize"}, "task must be next"),
        (
            {"attention": "performer", "pe": "none", "prior": "time"},
            "attention must be linear or softmax",
        ),
        ({"pe": "ape", "prior": "time"}, "pe must not be ape"),
        ({"pe": "sape"}, "pe must not be sape"),
        ({"labels": "another"}, "labels must be own"),
    ],
)
def test_models_without_a_step_are_refused(options, message):
    made = model.Model(model.Config(**{"task": "next", "dim": 16, "heads": 2} | options))
    with pytest.raises(ValueError, match=message):
        decoding.Pieces(made, [song_of_chords(0, 2)], [1])


def test_prompts_are_checked():
    made = model.Model(model.Config("next", "softmax", "none", "time", dim=16, heads=2))
    songs = [song_of_chords(0, 2), song_of_chords(1, 2)]
    for bars in ([0, 1], [3, 1]):
        with pytest.raises(ValueError, match=f"must be 1 to 2 bars of song 0, got {bars[0]}"):
            decoding.Pieces(made, songs, bars)
    with pytest.raises(ValueError, match=r"one length with softmax attention, got \[16, 32\]"):
        decoding.Pieces(made, songs, [1, 2])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 1.5}, "threshold must be 0 to 1, got 1.5"),
        ({"temperature": -1.0}, "temperature must be 0 or more, got -1.0"),
        ({"temperature": float("nan")}, "temperature must be 0 or more, got nan"),
        ({"top_k": 0}, "top_k must be 1 to 88, got 0"),
    ],
)
def test_sampler_is_checked(options, message):
    with pytest.raises(ValueError, match=message):
        decoding.Sampler(**options)


# the program


@pytest.fixture
def data(tmp_path):
    return str(save_songs(tmp_path / "songs.npz", train=2, test=2, bars=3))


def _run(data, out, *more):
    options = ["--data", data, "--out", str(out), "--dim", "16", "--heads", "2", "--threads", "1"]
    return generate.main([*options, "--steps", "3", "--train-bars", "2", *more])


def test_program_trains_plays_and_resumes(data, tmp_path, capsys):
    symusic = pytest.importorskip("symusic", reason="symusic is not installed")
    options = ["--prompt-bars", "2", "--song", "1"]
    assert _run(data, tmp_path / "once", *options, "--bars", "2") == 0
    state, checkpoint = str(tmp_path / "state.pt"), str(tmp_path / "once" / "checkpoint.pt")
    options += ["--model", checkpoint, "--bars", "1", "--save", state]
    assert _run(data, tmp_path, *options) == 0
    assert generate.main(["--resume", state, "--bars", "1", "--out", str(tmp_path / "twice")]) == 0
    once, twice = (tmp_path / run / "piece-0.mid" for run in ("once", "twice"))
    assert once.read_bytes() == twice.read_bytes()
    score = symusic.Score(once)
    assert [track.name for track in score.tracks] == ["prompt", "generated"]
    assert once.with_suffix(".png").stat().st_size > 5000
    # the song's beginning, and nothing of it after
    of_song = corpus.load(data)[3].cut(0, 2)
    wanted = sorted((start, pitch) for _, start, _, pitch in of_song.notes.tolist())
    found = sorted((note.time // 120, note.pitch) for note in score.tracks[0].notes)
    assert found == wanted
    assert capsys.readouterr().out.count("after 64 sixteenths") == 2


def test_program_tells_what_is_wrong(data, tmp_path, capsys):
    (tmp_path / "other.pt").write_text("nothing of ours")
    (tmp_path / "checkpoint.pt").touch()
    for options, message in (
        ((), "checkpoint.pt exists: take it with --model, or --overwrite it"),
        (("--resume", str(tmp_path / "none.pt")), "none.pt does not exist"),
        (("--resume", str(tmp_path / "other.pt")), "other.pt is no file of --save"),
        (("--model", str(tmp_path / "none.pt")), "none.pt does not exist"),
        (("--pe", "ape"), "pe must not be ape"),
        (("--bars", "0"), "bars must be 1 or more, got 0"),
        (("--song", "2"), "songs 2 to 2 must be of the 2 test songs"),
        (("--song", "-1"), "songs -1 to -1 must be of the 2 test songs"),
        (("--prompt-bars", "9"), "prompt must be 1 to 3 bars"),
    ):
        # by one of the options, or by what is there
        more = ("--overwrite",) if options else ()
        assert _run(data, tmp_path, *options, *more) == 1
        assert message in capsys.readouterr().err


# its speed


@pytest.fixture
def small(monkeypatch):
    size = {"task": "next", "dim": 16, "heads": 2, "prior": "time"}
    made = {
        speed.ELU: model.Config(pe="rope", feature_map="elu1", **size),
        speed.SOFTMAX: model.Config(attention="softmax", pe="rope", **size),
    }
    monkeypatch.setattr(speed, "MODELS", made)
    return made


def test_speed(small, data, tmp_path):
    options = ["--measure", "--lengths", "1", "4", "--seconds", "0.01"]
    assert _run(data, tmp_path, *options) == 0
    rows = [json.loads(line) for line in (tmp_path / "speed.jsonl").read_text().splitlines()]
    assert [(row["model"], row["bars"]) for row in rows] == [(n, b) for n in small for b in (1, 4)]
    for row in rows:
        assert row["steps_per_second"] == pytest.approx(1e3 * speed.STEPS / row["ms"]["median"])
        assert row["relative_error"] <= 1e-4
        assert row["threads"] == 1
    linear, same, short, long = (row["state_bytes"] for row in rows)
    assert (linear, 4 * short) == (same, long)
    assert (tmp_path / "speed.png").stat().st_size > 5000


def test_speed_refuses_wrong_steps_and_long_waits(small, data, monkeypatch):
    songs = corpus.load(data)
    last = speed.measure(songs, [1, 2], 0.01, patience=0)[-1]
    assert last["error"].startswith("left out: its forwards may take")
    assert "ms" not in last
    step = model.Model.step
    wrong = lambda *args: (step(*args)[0] + 1, step(*args)[1])  # noqa: E731
    monkeypatch.setattr(model.Model, "step", wrong)
    for row in speed.measure(songs, [1], 0.01):
        assert row["error"].startswith("steps differ from one forward by")
        assert row["wrong"]
        assert "ms" not in row
