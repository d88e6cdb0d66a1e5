"""Questions about sounds: their answers, the choices, mixtures, and that a seed says it all."""

import runpy
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import noise
from test_sources import embedded, flac, write

from salmonn_hf.model.audio import load_audio

SCRIPT = Path(__file__).parents[2] / "training" / "synthesis" / "make_sound_questions.py"
LABELS = ["dog barking", "rain", "piano (rendered)", "restaurant chatter", "gong", "white noise"]


@pytest.fixture
def files(tmp_path):
    kinds = ["music" if label in ("piano (rendered)", "gong") else "sound" for label in LABELS]
    sounds = [
        embedded(flac(0.3, i), f"{i}.flac", label=label, kind=kind)
        for i, (label, kind) in enumerate(zip(LABELS, kinds, strict=True))
    ]
    speech = [embedded(flac(0.8, 50 + i), f"s{i}.flac", text=f"line {i}") for i in range(6)]
    return write(tmp_path / "sounds.parquet", sounds), write(tmp_path / "speech.parquet", speech)


def make(files, output, monkeypatch, *more):
    arguments = ["--sounds", files[0], "--speech", files[1], "--output_dir", str(output), "--spoken", "2", *more]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--mixtures", "4", "--seed", "3", *arguments])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    return [pq.read_table(output / f"{name}.parquet").to_pylist() for name in ("questions", "mixtures")]


def test_answers_follow_from_labels_and_mixtures(files, tmp_path, monkeypatch):
    questions, mixtures = make(files, tmp_path / "out", monkeypatch, "--rounds", "3")
    asked = [(row["kind"], row["audio"]["path"], row["text"]) for row in questions]
    speech = {(path, answer) for kind, path, answer in asked if kind == "speech"}
    assert {answer for path, answer in speech if path.startswith(("s", "mixture"))} == {"yes"}
    # Chatter is voices, of which nobody says whether they are speech.
    assert {path for path, answer in speech if answer == "no"} == {"0.flac", "1.flac", "2.flac", "4.flac", "5.flac"}
    assert {row for row in asked if row[0] in ("animal", "instrument")} == {
        ("animal", "0.flac", "dog"),
        ("instrument", "2.flac", "piano"),
    }
    choices = [row for row in questions if row["kind"].startswith("which of five")]
    assert len(choices) == 3 * 6 + 2
    for row in choices:
        options = row["question"].split(": ")[1].removesuffix("?").replace(" or ", ", ").split(", ")
        assert len(set(options)) == 5 and row["text"] in options
        assert set(options) < {label.removesuffix(" (rendered)") for label in LABELS}
    assert len({tuple(row["question"].split(": ")[1]) for row in choices}) > 5  # in no fixed order
    assert {row["task"] for row in questions} == {"QA"} and {row["task"] for row in mixtures} == {"asr"}


def test_mixtures_are_the_speech_with_something_behind_it(files, tmp_path, monkeypatch):
    _, mixtures = make(files, tmp_path / "out", monkeypatch, "--snr", "10", "10")
    for row in mixtures:
        spoken = noise(0.8, 50 + int(row["text"].removeprefix("line ")))
        mixed = load_audio(row["audio"])
        assert len(mixed) == len(spoken) and row["seconds"] == pytest.approx(0.8)
        scale = mixed @ spoken / (spoken @ spoken)  # mixtures beyond full scale are turned down
        rest = mixed / scale - spoken
        assert 10 * np.log10((spoken**2).sum() / (rest**2).sum()) == pytest.approx(10, abs=0.5)


def test_the_same_seed_gives_the_same(files, tmp_path, monkeypatch):
    assert make(files, tmp_path / "a", monkeypatch) == make(files, tmp_path / "b", monkeypatch)
