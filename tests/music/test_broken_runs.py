"""Checkpoints, states and records whose fields are wrong: one clear line, and the run goes on."""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

import pytest
import songs
import torch
from damage import CHANGE, ODD, changed, fixed, refused
from hypothesis import given, settings
from hypothesis import strategies as st
from songs import example, song_of_chords

from fastpe_lab import checks

for package in ("matplotlib", "tqdm"):
    pytest.importorskip(package, reason=f"{package} is not installed")
decoding, findings, training = map(songs.module, ("decoding", "findings", "training"))
generate, harmonize, study = map(example, ("generate", "harmonize", "study"))
report = example("report")
Config, Budget = training.Config, training.Budget
# a model is made for each
few = settings(fixed, max_examples=40)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


# checkpoints and states


TENSORS = [torch.full((2, 3), float("nan")), torch.zeros(2, 3), torch.tensor(1), torch.zeros(0)]
CONTENT = [*ODD, *TENSORS]
CHANGE_OF_CONTENT = st.tuples(st.integers(0, 10**6), st.sampled_from(range(len(CONTENT) + 1)))


@pytest.fixture(scope="module")
def checkpoint(folder):
    config = Config(task="next", pe="rope", prior="time", dim=8, heads=2, layers=1)
    trainer = training.Trainer(config, Budget(steps=1, batch=1, bars=1))
    windows = harmonize.windows_of([song_of_chords(i, 2) for i in range(2)], config)
    trainer.train(windows, folder / "good.pt", quiet=True)
    return folder / "good.pt"


@few
@given(change=CHANGE_OF_CONTENT)
def test_any_damage_to_a_checkpoint(folder, checkpoint, change):
    path, checkpoint = folder / "checkpoint.pt", torch.load(checkpoint, weights_only=True)
    # what an optimiser keeps is its own
    parts = {name: part for name, part in checkpoint.items() if name != "optimizer"}
    damaged = changed(parts, change, CONTENT)
    torch.save({"optimizer": checkpoint["optimizer"], **damaged}, path)
    trainer = refused(path, lambda: training.restore(path))
    if trainer:
        assert all(bool(p.isfinite().all()) for p in trainer.model.parameters())
        assert 0 <= trainer.step <= trainer.budget.steps


@pytest.mark.parametrize(
    ("part", "field", "value", "said"),
    [
        ("config", "dim", 2**40, "config.dim must be 8 to 8, got 1099511627776"),
        ("config", "layers", 10**9, "config.layers must be 1 to 1, got 1000000000"),
        ("config", "pe", 3, "config.pe must be str, got 3"),
        ("budget", "lr", float("nan"), "budget.lr must be finite, got nan"),
        ("model", "head.bias", torch.full((176,), float("nan")), "model.head.bias must be finite"),
        (None, "threshold", 2.0, "threshold must be 0 to 1, got 2.0"),
        (None, "losses", [float("nan")], "losses must be finite, got nan"),
        (None, "step", "1", "step must be int, got '1'"),
    ],
)
def test_fields_of_checkpoints(tmp_path, checkpoint, part, field, value, said):
    content = torch.load(checkpoint, weights_only=True)
    (content[part] if part else content)[field] = value
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=rf"x\.pt is no checkpoint of this program: {said}"):
        training.restore(tmp_path / "x.pt")


@pytest.fixture(scope="module", params=["linear", "softmax"])
def state(folder, request):
    sizes = {"dim": 8, "heads": 2, "layers": 1}
    config = Config(task="next", attention=request.param, pe="rope", prior="time", **sizes)
    made = decoding.Pieces(decoding.Model(config), [song_of_chords(0, 2)], [1])
    sampler = decoding.Sampler(0.5, 1.0, 4, torch.Generator().manual_seed(0))
    generate.save(folder / "good-state.pt", made, sampler, [1])
    return folder / "good-state.pt"


@few
@given(change=CHANGE_OF_CONTENT)
def test_any_damage_to_a_state(folder, state, change):
    path = folder / "state.pt"
    torch.save(changed(torch.load(state, weights_only=True), change, CONTENT), path)
    args = generate.parse(["--resume", str(path)])
    found = refused(path, lambda: generate.resume(args))
    if found:
        found[0].go_on(2, found[1])
        for song in found[0].songs:
            songs.assert_sane(song)


# records


def _study_record():
    scores = dict.fromkeys(("onset_nll", "windows", findings.NLL, *findings.SCORES), 1.5)
    row = study.ROWS["none"]
    record = {"row": "none", "config": asdict(row.config), "budget": asdict(Budget(data="x"))}
    return record | {"bars": {"16": scores, "64": scores}, "songs": {}, "seconds": {}}


@fixed
@given(change=CHANGE)
def test_any_damage_to_a_study(folder, change):
    path, good = folder / "study.jsonl", _study_record()
    bad = changed(good, change)
    path.write_text("".join(json.dumps(r) + "\n" for r in (good, bad, good)))
    records, skipped = checks.json_lines(path, findings.check)
    assert len(records) + len(skipped) == 3
    assert all(line.isprintable() and "study.jsonl, line 2: " in line for line in skipped)
    study.read(path, Budget(data="x"))
    known = [record for record in records if record["row"] in study.ROWS]
    text = findings.report(known)
    assert "nan" not in text
    assert "inf" not in text


def test_a_study_goes_on_after_a_line_that_was_cut_off(tmp_path, capsys, monkeypatch):
    # processes would each import torch
    monkeypatch.setattr(study, "ProcessPoolExecutor", lambda jobs, **_: ThreadPoolExecutor(jobs))
    data = songs.save_songs(tmp_path / "songs.npz", bars=16)
    options = ["--data", str(data), "--out", str(tmp_path), "--steps", "1", "--jobs", "1"]
    options += ["--rows", "none", "--seeds", "0"]
    file = tmp_path / "study.jsonl"
    file.write_text('{"row": "none", "conf')
    assert study.main(options) == 0
    assert "skipped" in (said := capsys.readouterr().err)
    assert f"{file}, line 1: " in said
    # the new record has a line of its own
    records, skipped = checks.json_lines(file, findings.check)
    assert (len(records), len(skipped)) == (1, 1)


@pytest.fixture(scope="module")
def trained(folder):
    data = songs.save_songs(folder / "songs.npz", bars=4)
    options = ["--data", str(data), "--out", str(folder / "run"), "--steps", "1", "--threads", "1"]
    options += ["--batch", "1", "--bars", "4", "--dim", "8", "--heads", "2"]
    assert harmonize.main(["train", *options]) == 0
    return folder / "run"


def test_songs_too_short_to_be_judged_are_an_error(tmp_path, trained, capsys):
    short = songs.save_songs(tmp_path / "short.npz", bars=2)
    assert harmonize.main(["evaluate", "--data", str(short), "--out", str(trained)]) == 1
    assert "error: nothing was measured" in capsys.readouterr().err


def test_a_melody_whose_name_cannot_be_shown(tmp_path, trained, capsys):
    pytest.importorskip("symusic", reason="symusic is not installed")
    midi, song = songs.module("midi"), song_of_chords(0, 4)
    path = tmp_path / os.fsdecode(b"m\xe9lodie.mid")
    midi.write(tmp_path / "a.mid", {"melody": song.roll(songs.MELODY)})
    try:
        (tmp_path / "a.mid").rename(path)
    except OSError:
        pytest.skip("the file system takes UTF-8 names only")
    assert harmonize.main(["generate", "--melody", str(path), "--out", str(trained)]) == 0
    assert "m\\udce9lodie-harmonized.mid and m\\udce9lodie" in capsys.readouterr().out
    assert harmonize.name_of(path) == "m\\udce9lodie.mid"


RESULTS = songs.ROOT / "benchmarks" / "results" / "cpu-epyc-avx2-2-cores"


def _records(name):
    return [json.loads(line) for line in (RESULTS / name).read_text().splitlines()[:3]]


@fixed
@given(change=CHANGE, name=st.sampled_from(["baselines.jsonl", "decode.jsonl"]))
def test_any_damage_to_records(folder, change, name):
    first, second, third = _records(name)
    path = folder / name
    path.write_text("".join(json.dumps(r) + "\n" for r in (first, changed(second, change), third)))
    records, skipped = checks.json_lines(path, report.check)
    assert len(records) + len(skipped) == 3
    assert all(line.isprintable() and f"{name}, line 2: " in line for line in skipped)
    scaling = [r for r in records if "level" not in r]
    text = report.tables(scaling) if scaling else ""
    assert "nan" not in text
    lines = report.decoding_lines([r for r in records if "ms" in r and "level" in r])
    assert all(0 < line["rate"] < float("inf") for line in lines)


def test_report_skips_lines_and_fails_without_any(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(report, "plot", lambda records, path: True)
    path, whole = tmp_path / "x.jsonl", (RESULTS / "baselines.jsonl").read_text()
    path.write_text(whole + whole[:100])
    assert report.main([str(path)]) == 0
    out, error = capsys.readouterr()
    assert "**Forward**" in out
    assert error.startswith(f"skipped {path}, line 157: ")
    for content in ("", "\n", "no record\n"):
        path.write_text(content)
        assert report.main([str(path)]) == 1
        assert "x.jsonl has no record" in capsys.readouterr().err
