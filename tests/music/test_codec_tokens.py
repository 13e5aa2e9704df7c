"""The example on audio tokens: its sound, its quantiser, its model, and where chords stand."""

import json
import wave
from fractions import Fraction

import numpy as np
import pytest
import torch
from helpers import assert_within
from songs import example as load_example

example = load_example("codec_tokens")
codec, sound = example.codec, example.sound


def test_notes_end_where_they_are_struck_again():
    roll, onset = np.zeros((2, 6, 128), dtype=bool)
    roll[0:4, 60] = onset[0, 60] = onset[2, 60] = True
    roll[5, 64] = onset[5, 64] = True
    assert sound.notes_of(roll, onset) == [(0, 2, 60), (2, 4, 60), (5, 6, 64)]


def test_notes_sound_at_their_pitch_and_time():
    samples = sound.render([(1, 3, 69)], 4, 0.5)
    assert len(samples) == 2 * sound.SAMPLE_RATE
    assert np.abs(samples).max() == 1
    half = sound.SAMPLE_RATE // 2
    assert not samples[:half].any()
    assert not samples[3 * half :].any()
    # one hertz a bin: 440 Hz, and less of its octave
    spectrum = np.abs(np.fft.rfft(samples[half : 3 * half]))
    assert spectrum.argmax() == 440
    assert spectrum[0:430].max() < spectrum[880] < spectrum[440]


def test_sound_is_saved(tmp_path):
    samples = sound.render([(0, 1, 60)], 1, 0.1)
    sound.save_wav(tmp_path / "x.wav", samples)
    with wave.open(str(tmp_path / "x.wav")) as file:
        found = np.frombuffer(file.readframes(10**6), dtype="<i2")
        assert file.getframerate() == sound.SAMPLE_RATE
    assert np.abs(found / 32767 - samples).max() <= 1 / 32767


@pytest.mark.parametrize("rate", [50, 80])
def test_frames_of_sound_are_where_it_sounds(rate):
    """A click in the middle of frame i is loudest in frame i."""
    hop = sound.SAMPLE_RATE // rate
    for frame in (0, 7, 19):
        samples = np.zeros(20 * hop + 3)
        samples[frame * hop + hop // 2] = 1
        energies = sound.band_energies(samples, rate)
        assert energies.shape == (20, 48)
        assert energies.sum(1).argmax() == frame
    with pytest.raises(ValueError, match="frame_rate must divide 16000, got 75"):
        sound.band_energies(samples, 75)


def test_bands_are_an_eighth_of_an_octave():
    time = np.arange(sound.SAMPLE_RATE) / sound.SAMPLE_RATE
    for octave in (1, 3):
        energies = sound.band_energies(np.sin(2 * np.pi * 100 * 2**octave * time), 50)
        assert set(energies[10:40].argmax(1)) == {8 * octave}


def test_residual_k_means():
    generator = np.random.default_rng(0)
    frames = generator.standard_normal((300, 5))
    quantiser = sound.ResidualKMeans(frames, 3, 8)
    ids = quantiser.encode(frames)
    assert ids.shape == (300, 3)
    # every token is the nearest entry to what is left over
    rest = frames - frames.mean(0)
    errors = [np.square(rest).sum()]
    for book, column in zip(quantiser.codebooks, ids.T, strict=True):
        distance = np.square(rest[:, None] - book).sum(-1)
        assert np.array_equal(distance.argmin(1), column)
        rest = rest - book[column]
        errors.append(np.square(rest).sum())
    assert errors == sorted(errors, reverse=True)
    assert_within(torch.from_numpy(quantiser.decode(ids)), torch.from_numpy(frames - rest), 1e-12)
    with pytest.raises(ValueError, match="frames must be at least size = 8, got 7"):
        sound.ResidualKMeans(frames[:7], 3, 8)


def test_as_many_entries_as_frames_keep_all():
    frames = np.random.default_rng(0).standard_normal((8, 5))
    quantiser = sound.ResidualKMeans(frames, 1, 8)
    found = quantiser.decode(quantiser.encode(frames))
    assert_within(torch.from_numpy(found), torch.from_numpy(frames), 1e-12)


def test_chords_stand_at_the_frames_where_they_sound(tmp_path):
    """To the frame, of what is written in seconds and read back."""
    example.make_files(tmp_path, bars=12)
    tokens = codec.load_tokens(tmp_path / "tokens.npy", example.FRAME_RATE)
    labels = codec.load_labels(tmp_path / "chords.json")
    found = codec.positions_at_frames(labels, len(tokens.ids), tokens.frame_rate)
    # 12 bars of 16 sixteenths of 5/24 s: 40 s
    assert found.shape == (2000, 12)
    chroma = example.pieces.load().chroma
    centre = Fraction(1, 2)
    steps = [(i + centre) / example.FRAME_RATE // example.STEP for i in range(len(found))]
    assert np.array_equal(found, chroma[np.array(steps, dtype=int)])
    # bars are 166 and 167 frames, as 500/3 has it
    edges = np.flatnonzero((found[1:] != found[:-1]).any(1)) + 1
    assert set(np.diff(edges)) == {166, 167}


@pytest.mark.parametrize("row", example.ROWS)
def test_the_model_sees_no_token_that_it_says(row):
    torch.manual_seed(0)
    model = example.make_model(row, [5, 7], 12).double().eval()
    ids = torch.stack([torch.randint(size, (1, 9)) for size in (5, 7)], dim=-1)
    positions = torch.randint(2, (1, 9, 12)).double()
    at = None if "time" in row or "none" in row else positions
    changed = ids.clone()
    changed[:, 4] = (changed[:, 4] + 1) % torch.tensor([5, 7])
    with torch.no_grad():
        before, after = model(ids, at, positions), model(changed, at, positions)
    for x, y in zip(before, after, strict=True):
        assert_within(x[:, :5], y[:, :5], 1e-12)
        assert (x[:, 5:] - y[:, 5:]).abs().amax(-1).min() > 1e-6


def test_it_runs(tmp_path, capsys):
    example.main(["--out", str(tmp_path), "--bars", "2", "--steps", "2"])
    out = capsys.readouterr().out
    assert "2 labels, 2 different, on 333 frames" in out
    table = out.splitlines()[-len(example.ROWS) :]
    for row, line in zip(example.ROWS, table, strict=True):
        assert line.startswith(row)
        *losses, mean, _ = (float(x) for x in line[22:].split())
        assert len(losses) == 4
        assert mean == pytest.approx(np.mean(losses), abs=2e-3)
        # little is learned in two steps of what is at first one of 64
        assert 0 < mean < 2 * np.log(64)
    # from files, whoever made them, with names for chords
    chords = [{"start": 0, "end": 3, "label": "C"}, {"start": 3, "end": 5.5, "label": "F"}]
    (tmp_path / "names.json").write_text(json.dumps(chords))
    files = ["--tokens", str(tmp_path / "tokens.npy"), "--labels", str(tmp_path / "names.json")]
    example.main([*files, "--steps", "1", "--frame-rate", "50"])
    assert "2 labels, 3 different, on 333 frames" in capsys.readouterr().out


def test_bad_input(tmp_path, capsys):
    np.save(tmp_path / "two.npy", np.zeros((2, 4), dtype=int))
    (tmp_path / "one.json").write_text('[{"start": 0, "end": 1, "label": "C"}]')
    tokens, labels = str(tmp_path / "two.npy"), str(tmp_path / "one.json")
    for arguments, message in (
        (["--tokens", tokens], "--tokens and --labels go together"),
        (["--tokens", "none.npy", "--labels", labels], "tokens file none.npy does not exist"),
        (["--tokens", tokens, "--labels", tokens], "is not in the expected format"),
        (["--tokens", tokens, "--labels", labels], "tokens must have at least 3 frames, got 2"),
    ):
        with pytest.raises(SystemExit):
            example.main(arguments)
        assert message in capsys.readouterr().err
