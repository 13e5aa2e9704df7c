"""The harmonizer: what it hears and says, its training and checkpoints, its commands."""

import importlib
import json
import signal
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from songs import corpus, module, save_songs, song_of_chords

from music import evaluation, findings, training, windows
from music.model import ADDED, ENCODINGS, Config, Model, nats
from music.rows import ROWS
from music.training import Budget, Trainer
from music.windows import Windows

BASELINES = importlib.import_module("fastpe_lab.baselines").BASELINES
harmonize = importlib.import_module("harmonize")
SMALL = {"dim": 16, "heads": 2, "layers": 2}


def config(**options):
    return Config(**SMALL | {"pe": "fstripe", "prior": "bin"} | options)


# windows


def test_windows_are_the_song():
    song = song_of_chords(3, 9)
    window = Windows([song], "harmonize", "time+bin").window(0, 2, 4)
    low, high = windows.LOWEST, windows.LOWEST + windows.KEYS
    for channel, draw in enumerate((song.roll, song.onsets)):
        heard = window.inputs[:, channel * windows.KEYS : (channel + 1) * windows.KEYS]
        assert np.array_equal(heard, draw(corpus.MELODY)[32:96, low:high])
        assert np.array_equal(
            window.target[:, channel], draw(corpus.ACCOMPANIMENT)[32:96, low:high]
        )
    # structure as it is there, time from the window's beginning
    assert np.array_equal(window.positions[:, 0], np.arange(64))
    assert np.array_equal(window.positions[:, 1:], song.positions("bin")[32:96])
    chords = Windows([song], "harmonize", "time", chords=True).window(0, 2, 4)
    assert torch.equal(chords.inputs[:, -12:].double(), window.positions[:, 1:])


def test_next_hears_what_came_before_and_no_more():
    window = Windows([song_of_chords()], "next", "time").window(0, 1, 3)
    assert not window.inputs[0].any()
    assert torch.equal(window.inputs[1:].view(-1, 2, windows.KEYS), window.target[:-1])


def test_labels_of_another_song():
    songs = [song_of_chords(i, bars) for i, bars in ((0, 8), (1, 12), (2, 8))]
    made = {
        labels: Windows(songs, "harmonize", "bin", labels=labels) for labels in ("own", "another")
    }
    own, other = (made[labels].window(1, 8, 4) for labels in made)
    assert torch.equal(own.inputs, other.inputs)
    assert torch.equal(own.target, other.target)
    # song 2 ends before: its first bars
    assert np.array_equal(other.positions, songs[2].cut(0, 4).positions("bin"))


def test_random_windows_are_a_function_of_the_generator():
    made = Windows([song_of_chords(i) for i in range(3)], "harmonize", "rep")
    a, b, c = (made.random(5, 4, np.random.default_rng((0, step))) for step in (1, 1, 2))
    assert torch.equal(a.inputs, b.inputs)
    assert not torch.equal(a.inputs, c.inputs)
    assert a.inputs.shape == (5, 64, 176)
    assert a.positions.shape == (5, 64, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "sing"}, "task must be 'harmonize' or 'next', got 'sing'"),
        ({"priors": "time+beat"}, "prior must be of time, .*, got 'beat'"),
        ({"labels": "no"}, "labels must be 'own' or 'another', got 'no'"),
        ({"labels": "another"}, "labels of another song need two songs, got 1"),
    ],
)
def test_windows_refuse(options, message):
    with pytest.raises(ValueError, match=message):
        Windows(**{"songs": [song_of_chords()], "task": "harmonize", "priors": "time"} | options)


# models


def _kinds():
    for pe in (*ADDED, *ENCODINGS):
        prior = "bin" if pe.startswith(("fstripe", "rope", "sape")) else "time"
        yield pytest.param({"pe": pe, "prior": prior}, id=pe)
    yield pytest.param({"pe": "ropepool", "feature_map": "elu1"}, id="ropepool-elu1")
    yield pytest.param({"pe": "rope", "prior": "time", "attention": "softmax"}, id="softmax-rope")
    for name, baseline in BASELINES.items():
        if baseline.causal:
            prior = "rep" if baseline.structured else "time"
            options = {"attention": name, "pe": "none", "prior": prior}
            yield pytest.param(options, id=name)


@pytest.mark.parametrize("options", list(_kinds()))
def test_models_are_causal(options):
    """What comes later changes nothing; what comes now does, here and later."""
    torch.manual_seed(0)
    model = Model(config(**options)).double().eval()
    made = Windows([song_of_chords(1)], "harmonize", model.config.prior)
    window = made.window(0, 0, 2)
    inputs, positions = window.inputs[None].double(), window.positions[None]
    at = 17
    with torch.no_grad():
        before, _ = model(inputs, positions)
        changed = inputs.clone()
        changed[:, at] = 1 - changed[:, at]
        after, _ = model(changed, positions)
    difference = (before - after).abs().amax((0, 2, 3))
    assert difference[:at].max() < 1e-12 * before.abs().max()
    assert difference[at] > 1e-6
    assert difference[at + 1 :].max() > 1e-9


def test_nats_are_bits_of_the_keys():
    torch.manual_seed(0)
    logits = torch.randn(3, 5, 2, 88).double()
    target = (torch.rand(3, 5, 2, 88) > 0.7).double()
    sounding, struck = nats(logits, target)
    p = logits.sigmoid()
    chance = torch.where(target > 0, p, 1 - p).log()
    torch.testing.assert_close(sounding, -chance[..., 0, :].sum(-1))
    torch.testing.assert_close(struck, -(chance[..., 1, :] * target[..., 0, :]).sum(-1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pe": "alibi"}, "pe must be one of none, .*, got 'alibi'"),
        ({"attention": "mamba"}, "attention must be one of linear, .*, got 'mamba'"),
        ({"attention": "shaw"}, "pe must be one of none, .* with attention shaw, got 'fstripe'"),
        ({"pe": "ape"}, "prior must be 'time' with pe ape, got 'bin'"),
        ({"pe": "spe"}, "prior must be one number with pe spe, got 'bin'"),
        ({"heads": 3}, "heads divide dim, got 16, 3 and 2"),
        (
            {"attention": "shaw", "pe": "none", "prior": "time", "feature_map": "favor"},
            "feature_map is of linear attention: .* got 'favor'",
        ),
        ({"pe": "rope", "dim": 6}, "dim / heads must be even with pe rope, got 6 / 2"),
        ({"feature_map": "sin"}, "feature_map must be one of favor, .*, got 'sin'"),
    ],
)
def test_configurations_refused(options, message):
    with pytest.raises(ValueError, match=message):
        config(**options)


def test_structure_is_learned():
    """With its own chords as positions a model says them, with another song's it does not."""
    songs = [song_of_chords(i, 16) for i in range(8)]
    found = {}
    for name, options in {
        "own": {},
        "another": {"labels": "another"},
        "none": {"pe": "none", "prior": "time"},
    }.items():
        made = config(pe="ropepool", feature_map="elu1") if name != "none" else config(**options)
        made = replace(made, labels=options.get("labels", "own"))
        trainer = Trainer(made, Budget(steps=60, batch=4, bars=4, lr=1e-2))
        part = {
            key: harmonize.windows_of(some, made)
            for key, some in (("seen", songs[:6]), ("unseen", songs[6:]))
        }
        trainer.train(part["seen"], quiet=True)
        found[name] = evaluation.evaluate(trainer.model, part["unseen"], 4, 0.5)["nll"]
    assert found["own"] < 0.7 * found["another"]
    assert found["own"] < 0.7 * found["none"]


# training


def _trained(steps, path=None, resume=False, stop=None, monkeypatch=None):
    made = config(pe="spe", prior="time")
    trainer = Trainer(made, Budget(steps=steps, batch=2, bars=2))
    if resume:
        trainer.resume(path)
    if stop is not None:
        update = trainer.update

        def interrupted(window):
            if trainer.step == stop:
                signal.raise_signal(signal.SIGINT)
            return update(window)

        monkeypatch.setattr(trainer, "update", interrupted)
    songs = [song_of_chords(i) for i in range(3)]
    return trainer, trainer.train(harmonize.windows_of(songs, made), path, quiet=True)


def test_training_that_is_cut_off_goes_on(tmp_path, monkeypatch):
    """Ctrl-C leaves a checkpoint, and what follows is to the bit what would have followed."""
    path = tmp_path / "checkpoint.pt"
    whole, ended = _trained(7)
    assert ended
    first, ended = _trained(7, path, stop=3, monkeypatch=monkeypatch)
    assert not ended
    # the step that was being taken was taken
    assert first.step == 4
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    second, ended = _trained(7, path, resume=True)
    assert ended
    assert second.losses == whole.losses
    for a, b in zip(whole.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert training.restore(path).step == 7


def test_checkpoints_of_others_are_refused(tmp_path):
    path = tmp_path / "checkpoint.pt"
    trainer, _ = _trained(1, path)
    for other, message in (
        (
            Trainer(replace(trainer.config, pe="rope"), trainer.budget),
            "pe = 'spe', got pe = 'rope'",
        ),
        (Trainer(trainer.config, replace(trainer.budget, seed=1)), "seed = 0, got seed = 1"),
        (Trainer(trainer.config, replace(trainer.budget, data="x")), "data = '', got data = 'x'"),
    ):
        with pytest.raises(ValueError, match=f"made with {message}"):
            other.resume(path)
    with pytest.raises(ValueError, match=r"none\.pt does not exist; train first"):
        training.read(tmp_path / "none.pt")
    for content in (b"", b"no checkpoint", path.read_bytes()[:-200]):
        (tmp_path / "broken.pt").write_bytes(content)
        with pytest.raises(ValueError, match="is no checkpoint"):
            training.read(tmp_path / "broken.pt")
    torch.save({"model": {}}, path)
    with pytest.raises(ValueError, match="is no checkpoint of this program"):
        training.read(path)


def test_a_threshold_keeps_the_density():
    songs = [song_of_chords(i) for i in range(3)]
    made = harmonize.windows_of(songs, config())
    torch.manual_seed(0)
    model = Model(config())
    threshold = evaluation.fit_threshold(model, made, 4)
    starts = made.starts(4)
    logits, target = evaluation.outputs_of(model, made, starts, 4)
    said, truth = logits[:, :, 0].sigmoid() > threshold, target[:, :, 0]
    assert abs(said.double().mean() / truth.double().mean() - 1) < 0.02


# commands


def _run(capsys, *options):
    code = harmonize.main([*map(str, options)])
    out, err = capsys.readouterr()
    return code, out, err


def test_commands(tmp_path, capsys):
    data, out = save_songs(tmp_path / "songs.npz"), tmp_path / "run"
    options = ["--data", data, "--out", out, "--steps", 3, "--batch", 2, "--bars", 4]
    options += ["--dim", 16, "--heads", 2, "--play-bars", 3, "--threads", 1]
    code, text, _ = _run(capsys, *options)
    assert code == 0
    found = json.loads((out / "metrics.json").read_text())
    assert found["step"] == 3
    assert {int(bars): scores["windows"] for bars, scores in found["bars"].items()} == {
        4: 10,
        16: 2,
    }
    assert (out / "song-0.png").stat().st_size > 5000
    midi = importlib.import_module("music.midi")
    song = midi.read(out / "song-0.mid")
    assert np.array_equal(
        song.roll(corpus.MELODY)[:48], song_of_chords(6).cut(0, 3).roll(corpus.MELODY)
    )
    assert "wrote" in text
    # what was trained is not trained again, of another configuration is refused
    code, _, error = _run(capsys, "train", *options, "--pe", "rope", "--resume")
    assert code == 1
    was, now = "pe = 'ropepool', prior = 'bin'", "pe = 'rope', prior = 'time'"
    assert f"was made with {was}, got {now}" in error
    code, text, _ = _run(capsys, "train", *options, "--resume")
    assert code == 0
    for bad, message in (
        (["--song", 2], "song must be 0 to 1, got 2"),
        (["--first-bar", 20], "first-bar must be 0 to 19, got 20"),
        (["--play-bars", 0], "play-bars must be 1 or more, got 0"),
        (["--temperature", -1], "temperature must be 0 or more, got -1.0"),
        (["--threads", 0], "threads must be 1 or more, got 0"),
        (["--melody", data], "songs.npz: broken, or not a MIDI file"),
        (["--out", tmp_path / "none"], "does not exist; train first"),
    ):
        code, _, error = _run(capsys, "generate", *options, *bad)
        assert code == 1
        assert error.startswith("error: ")
        assert message in error
        assert error.count("\n") == 1


def test_a_melody_stays_as_it_is(tmp_path, capsys):
    """Written beside it; and what was trained on other songs says so."""
    data, out = save_songs(tmp_path / "songs.npz"), tmp_path / "run"
    options = ["--out", out, "--threads", 1]
    small = ["--steps", 1, "--batch", 1, "--bars", 2, "--dim", 16, "--heads", 2]
    assert _run(capsys, "train", "--data", data, *small, *options)[0] == 0
    module("midi").write(out / "mine.mid", {"melody": song_of_chords(9).roll(corpus.MELODY)})
    before = (out / "mine.mid").read_bytes()
    other = save_songs(tmp_path / "others.npz")
    code, text, _ = _run(
        capsys, "generate", "--data", other, "--melody", out / "mine.mid", *options
    )
    assert code == 0
    assert "trained on songs.npz, now on others.npz" in text
    assert (out / "mine.mid").read_bytes() == before
    assert module("midi").read(out / "mine-harmonized.mid").num_bars >= 1
    # and it is not trained anew unless that is asked for
    code, _, error = _run(capsys, "train", "--data", data, *small, *options)
    assert code == 1
    assert "exists: go on from it with train --resume, or --overwrite it" in error
    assert _run(capsys, "train", "--overwrite", "--data", data, *small, *options)[0] == 0


def test_unfinished_trainings_are_not_judged(tmp_path, monkeypatch, capsys):
    path = tmp_path / "run" / "checkpoint.pt"
    _trained(7, path, stop=3, monkeypatch=monkeypatch)
    code, _, error = _run(capsys, "evaluate", "--out", path.parent)
    assert code == 1
    assert "is of step 4 of 7: go on with train --resume" in error


def test_a_loss_that_is_not_finite_ends_the_program(tmp_path, capsys):
    data = save_songs(tmp_path / "songs.npz")
    options = ["--steps", 9, "--batch", 1, "--bars", 2, "--dim", 16, "--heads", 2, "--lr", 1e30]
    code, _, error = _run(capsys, "train", "--data", data, "--out", tmp_path / "run", *options)
    assert code == 1
    assert "error: the loss of step" in error


def test_phrases_must_be_known():
    song = song_of_chords()
    unknown = replace(song, phrase=np.full(song.num_bars, -1))
    Windows([unknown, song], "harmonize", "phrase")
    with pytest.raises(ValueError, match="whose phrases are not known"):
        Windows([unknown], "harmonize", "time+phrase")


def test_studies_of_other_budgets_are_apart(tmp_path):
    study, file = importlib.import_module("study"), tmp_path / "study.jsonl"
    budget = Budget(steps=5, data="x")
    of = {"row": "none", "config": asdict(ROWS["none"].config), "bars": {}}
    others = [replace(budget, steps=6), replace(budget, data="y"), replace(budget, seed=2), budget]
    records = [of | {"budget": asdict(other)} for other in others]
    records.append(records[-1] | {"config": records[-1]["config"] | {"dim": 64}})
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert set(study.read(file, budget)) == {("none", 0), ("none", 2)}


def test_study(tmp_path, capsys):
    """It trains each row and seed once, and says what it found."""
    study = importlib.import_module("study")
    data, out = save_songs(tmp_path / "songs.npz", bars=16), tmp_path / "study"
    options = ["--data", str(data), "--out", str(out), "--steps", "1", "--jobs", "1"]
    options += ["--rows", "none", "fstripe-bin", "--seeds", "0", "1"]
    for _ in range(2):
        assert study.main(options) == 0
        records = [json.loads(line) for line in (out / "study.jsonl").read_text().splitlines()]
        assert len(records) == 4
    found = {(r["row"], r["budget"]["seed"]): r["bars"]["16"]["nll"] for r in records}
    gains = [found["none", seed] - found["fstripe-bin", seed] for seed in (0, 1)]
    assert findings.gain(records, "fstripe-bin", "none", "16") == gains
    text = capsys.readouterr().out
    assert f"{min(gains):.3f} to {max(gains):.3f}" in text
    assert (out / "study.png").stat().st_size > 5000


def test_intervals():
    # 4.303 s / sqrt(3) with s = 1
    assert findings.interval([1.0, 2.0, 3.0]) == "2.000 ± 2.484"
    assert findings.interval([1.5]) == "1.500"
    assert findings.base_of("fstripe-bin-wrong") == "none"
    assert findings.base_of("ropepool-bin-elu1") == "none-elu1"
