"""Corpora, pieces, labels and tokens whose fields are wrong: one clear line that names the file."""

import json
import zipfile

import numpy as np
import pytest
import songs
import torch
from damage import CHANGE, changed, fixed, refused
from hypothesis import given
from hypothesis import strategies as st
from songs import corpus, make_song, song_of_chords

from fastpe_lab import pieces

pytest.importorskip("tqdm", reason="tqdm is not installed")
chorales, codec = map(songs.module, ("chorales", "codec"))
EDITS = st.lists(st.tuples(st.integers(0, 10**5), st.integers(0, 255)), min_size=1, max_size=5)


# corpora


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("files")


@pytest.fixture(scope="module")
def arrays(folder):
    corpus.save([make_song(0), make_song(1, bars=2)], folder / "good.npz")
    with np.load(folder / "good.npz") as file:
        return dict(file)


def _load(path):
    found = refused(path, lambda: corpus.load(path))
    for song in found or ():
        songs.assert_sane(song)
        for prior in corpus.PRIORS:
            assert np.isfinite(song.positions(prior)).all()
    return found


FIELDS = {
    "bpm": (np.inf, "song 0: bpm must be finite, got inf"),
    "key_tonic": (12, "song 0: tonic must be 0 to 11, got 12"),
    "n_bars": (2**40, "song 0: n_bars must be 1 to 5000, got 1099511627776"),
    "split": ("dev", "song 0: split must be of"),
    "note_ptr": (-1, "note_ptr must be 0 to 80, got -1"),
    "chord_per_beat": (-1, "song 0: chord_per_beat must be 0 to 2, got -1"),
    "chord_root": (12, "root of a chord must be -1 to 11, got 12"),
    "chord_mask": (4096, "chord_mask must be 0 to 4095, got 4096"),
}


@pytest.mark.parametrize("field", FIELDS)
def test_fields_of_corpora(folder, arrays, field):
    value, said = FIELDS[field]
    changed = arrays[field].astype(np.int64 if isinstance(value, int) else arrays[field].dtype)
    # every chord is in one of the songs
    changed[: 1 if field != "chord_root" else None] = value
    np.savez(folder / "x.npz", **{**arrays, field: changed})
    with pytest.raises(ValueError, match=r"x\.npz is not in the expected format: .*" + said):
        corpus.load(folder / "x.npz")


@pytest.mark.parametrize(
    ("column", "value", "said"),
    [
        (0, 3, "track of a note must be 0 to 2, got 3"),
        (1, 2**28, "first tick of a note must be -320000 to 320000, got 268435456"),
        (2, -1, "ticks of a note must be 0 to 320000, got -1"),
        (2, 2**62, "ticks of a note must be 0 to 320000"),
        (3, 128, "pitch of a note must be 0 to 127, got 128"),
    ],
)
def test_notes_of_corpora(folder, arrays, column, value, said):
    notes = arrays["notes"].astype(np.int64)
    notes[3, column] = value
    np.savez(folder / "x.npz", **{**arrays, "notes": notes})
    with pytest.raises(ValueError, match=rf"x\.npz .*: song 0: {said}"):
        corpus.load(folder / "x.npz")


ENTRIES = [-1, 0, 1, 5, 12, 128, 2**15, 2**31 - 1, 2**63 - 1, -(2**63)]
DTYPES = ["f8", "i1", "i8", "u8", "?", "c16", "S5", "U5", "O", "M8[s]", "V4"]


@fixed
@given(data=st.data())
def test_any_damage_to_a_field_of_a_corpus(folder, arrays, data):
    changed = dict(arrays)
    for _ in range(data.draw(st.integers(1, 2))):
        name = data.draw(st.sampled_from(sorted(changed)))
        value = changed[name]
        how = data.draw(st.sampled_from(["entry", "dtype", "cut", "add", "flat", "gone"]))
        if how == "entry" and value.size and value.dtype.kind in "iu":
            value = value.astype(np.int64)
            value.flat[data.draw(st.integers(0, value.size - 1))] = data.draw(
                st.sampled_from(ENTRIES)
            )
        elif how == "dtype" and value.dtype.kind in "iuf":
            value = np.zeros(value.shape, data.draw(st.sampled_from(DTYPES)))
        elif how == "cut":
            value = value[: data.draw(st.integers(0, len(value)))] if value.ndim else value
        elif how == "add" and value.ndim:
            value = np.concatenate((value, value[-1:]))
        elif how == "flat":
            value = value.reshape(-1)
        if how == "gone":
            del changed[name]
        else:
            changed[name] = value
    np.savez(folder / "any.npz", **changed)
    _load(folder / "any.npz")


@fixed
@given(edits=EDITS)
def test_any_damage_to_the_bytes_of_a_corpus(folder, arrays, edits):
    np.savez(folder / "plain.npz", **arrays)
    whole = bytearray((folder / "plain.npz").read_bytes())
    for at, value in edits:
        whole[at % len(whole)] = value
    (folder / "bytes.npz").write_bytes(whole)
    _load(folder / "bytes.npz")


@pytest.mark.parametrize(("name", "shape"), [("notes", (2**45, 5)), ("n_bars", (2**45,))])
def test_arrays_that_say_they_are_huge(folder, arrays, name, shape):
    """The shape stands in a header, and memory for it is asked for before anything is read."""
    path = folder / "huge.npz"
    np.savez(path, **{key: value for key, value in arrays.items() if key != name})
    said = {"descr": "<i8", "fortran_order": False, "shape": shape}
    with zipfile.ZipFile(path, "a") as archive, archive.open(f"{name}.npy", "w") as file:
        np.lib.format.write_array_header_1_0(file, said)
        file.write(bytes(80))
    assert _load(path) is None


def test_a_broken_cache_is_written_anew(tmp_path, monkeypatch, capsys):
    made = [song_of_chords(i) for i in range(3)]
    monkeypatch.setattr(chorales, "paths", list)
    monkeypatch.setattr(chorales, "parse", lambda scores: made)
    cache = tmp_path / "chorales.npz"
    cache.write_bytes(b"cut off")
    assert len(chorales.load(cache)) == 3
    assert "chorales.npz is not in the expected format" in capsys.readouterr().out
    assert [song.title for song in corpus.load(cache)] == [song.title for song in made]


def test_scores_that_cannot_be_read_are_skipped(tmp_path, capsys):
    pytest.importorskip("music21")
    (tmp_path / "a.mxl").write_bytes(b"no score")
    (tmp_path / "b.xml").write_bytes(b"<score-partwise><part>")
    good = next(path for path in chorales.paths() if path.stem == "bwv66.6")
    found = chorales.parse([tmp_path / "a.mxl", good, tmp_path / "b.xml"])
    assert [song.title for song in found] == ["bwv66.6"]
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("skipped")]
    assert [line.split(":")[0] for line in lines] == ["skipped a.mxl", "skipped b.xml"]


# pieces, tokens, labels


PIECE = json.loads(pieces.BACH.read_text())
PIECE["bars"] = [PIECE["bars"][0], PIECE["bars"][-2], PIECE["bars"][-1]]


@fixed
@given(change=CHANGE)
def test_any_damage_to_a_piece(folder, change):
    path = folder / "piece.json"
    path.write_text(json.dumps(changed(PIECE, change)))
    piece = refused(path, lambda: pieces.load(path))
    if piece:
        assert len(piece) == 16 * (piece.bar[-1] + 1) <= 48
        assert piece.name.isprintable()
        assert ((piece.chroma == 0) | (piece.chroma == 1)).all()


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("steps_per_bar", 10**9, "steps_per_bar must be 16 to 16, got 1000000000"),
        ("tonic", None, "tonic must be int, got None"),
        ("bars", [], "number of bars must be 1 to 5000, got 0"),
        ("bars", [[]], r"bars\[0\] must be dict, got \[\]"),
        ("bars", [PIECE["bars"][0] | {"chord": ""}], r"bars\[0\].chord must begin with its root"),
        ("bars", [PIECE["bars"][0] | {"pitches": [60] * 4}], "pitches must be 5 to 5, got 4"),
        ("bars", [PIECE["bars"][0] | {"pitches": [60] * 4 + [128]}], "must be 0 to 127, got 128"),
    ],
)
def test_fields_of_pieces(tmp_path, field, value, said):
    (tmp_path / "x.json").write_text(json.dumps(PIECE | {field: value}))
    with pytest.raises(ValueError, match=rf"x\.json is not in the expected format: .*{said}"):
        pieces.load(tmp_path / "x.json")


def test_json_that_is_too_deep(tmp_path):
    path = tmp_path / "deep.json"
    path.write_text("[" * 100_000)
    for read in (pieces.load, codec.load_labels):
        assert refused(path, lambda read=read: read(path)) is None


LABELS = [
    {"start": 0, "end": 0.5, "label": [1, 0.5]},
    {"start": 0.5, "end": 1, "label": [0, 1]},
]


@fixed
@given(change=CHANGE, names=st.booleans())
def test_any_damage_to_labels(folder, change, names):
    path = folder / "labels.json"
    rows = [row | {"label": "A"} for row in LABELS] if names else LABELS
    path.write_text(json.dumps(changed(rows, change)))
    labels = refused(path, lambda: codec.load_labels(path))
    if labels:
        assert np.isfinite(codec.positions_at_frames(labels, 50, 50)).all()


@fixed
@given(edits=EDITS)
@pytest.mark.parametrize("kind", ["npy", "pt"])
def test_any_damage_to_tokens(folder, kind, edits):
    path, ids = folder / f"tokens.{kind}", np.arange(12).reshape(6, 2)
    np.save(path, ids) if kind == "npy" else torch.save(torch.from_numpy(ids), path)
    whole = bytearray(path.read_bytes())
    for at, value in edits:
        whole[at % len(whole)] = value
    path.write_bytes(whole)
    tokens = refused(path, lambda: codec.load_tokens(path, 50))
    if tokens:
        assert 0 <= tokens.ids.min() <= tokens.ids.max() < 2**20


@pytest.mark.parametrize(
    "value",
    [
        pytest.param(torch.eye(2, dtype=torch.int64).to_sparse(), id="sparse"),
        pytest.param(torch.zeros(2, 2, dtype=torch.int64, device="meta"), id="meta"),
        pytest.param(torch.tensor([[0, 2**40]]), id="large"),
    ],
)
def test_tensors_that_are_no_tokens(tmp_path, value):
    torch.save(value, tmp_path / "x.pt")
    assert refused(tmp_path / "x.pt", lambda: codec.load_tokens(tmp_path / "x.pt", 50)) is None
