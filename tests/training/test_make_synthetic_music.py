"""Synthetic music: MIDI by the specification's examples, the pitch that is heard, captions that say what is played."""

import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from salmonn_hf.model.audio import load_audio

SCRIPT = Path(__file__).parents[2] / "training" / "synthesis" / "make_synthetic_music.py"
SOUNDFONT = Path("/usr/share/sounds/sf2/TimGM6mb.sf2")
music = runpy.run_path(str(SCRIPT))

needs_fluidsynth = pytest.mark.skipif(
    shutil.which("fluidsynth") is None or not SOUNDFONT.exists(),
    reason="rendering needs fluidsynth: apt-get install fluidsynth timgm6mb-soundfont",
)


@pytest.mark.parametrize(
    "number, data",
    [(0, "00"), (0x40, "40"), (0x7F, "7f"), (0x80, "8100"), (0x2000, "c000"), (0x3FFF, "ff7f"), (0x4000, "818000")],
)
def test_numbers_as_in_the_midi_specification(number, data):
    assert music["variable_length"](number).hex() == data


def test_captions_say_what_is_played():
    for seed in range(20):
        piece = music["compose"](np.random.default_rng(seed), 4.0)
        texts = music["captions"](piece)
        assert len(set(texts)) == 5 and all(piece.instrument in text.lower() for text in texts)
        assert all(("drum beat" in text) == piece.drums for text in texts)
        scale = {note % 12 for _, _, note, channel in piece.notes if channel == 0}
        root = (min(note for _, _, note, channel in piece.notes if channel == 0)) % 12
        third = (root + (4 if piece.mode == "major" else 3)) % 12
        wrong = (root + (3 if piece.mode == "major" else 4)) % 12
        if piece.texture == "scale" and len(scale) >= 3:
            assert third in scale and wrong not in scale
        starts = [start for start, *_ in piece.notes]
        assert max(starts) * 60 / piece.beats_per_minute < 4.0


@needs_fluidsynth
def test_a_note_is_heard_at_its_pitch():
    """Middle A is 440 Hz, in equal temperament."""
    piece = music["Piece"]("flute", "melody", "slow", "major", False, 60.0, [(0.0, 2.0, 69, 0)])
    waveform = music["render"](music["midi_file"](piece, np.random.default_rng(0)), SOUNDFONT)[8000:24000]
    peak = np.abs(np.fft.rfft(waveform * np.hanning(len(waveform)))).argmax() * 16000 / len(waveform)
    assert peak == pytest.approx(440, rel=0.01)


@needs_fluidsynth
def test_the_same_seed_gives_the_same_pieces(tmp_path, monkeypatch):
    def make(name):
        output = tmp_path / name
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--output", str(output), "--clips", "3", "--seed", "5"])
        runpy.run_path(str(SCRIPT), run_name="__main__")
        return pq.read_table(output).to_pylist()

    rows = make("a.parquet")
    assert rows == make("b.parquet")
    assert len({row["audio"]["path"] for row in rows}) == 3
    for row in rows:
        assert len(load_audio(row["audio"])) == pytest.approx(16000 * row["seconds"]) and 2 < row["seconds"] <= 6
        assert row["kind"] == "music" and row["label"].removesuffix(" (rendered)") in row["captions"][0].lower()


def test_a_missing_soundfont_names_the_package(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--output", "x", "--soundfont", str(tmp_path / "none.sf2")])
    with pytest.raises(SystemExit, match="apt-get install fluidsynth"):
        runpy.run_path(str(SCRIPT), run_name="__main__")
