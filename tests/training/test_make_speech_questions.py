"""Questions about what is said: what can be asked of a transcript, balance, captions, and that a seed says it all."""

import runpy
import sys
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from test_sources import embedded, flac, write

from salmonn_hf.evaluation.answer_metrics import normalise_answer
from salmonn_hf.model.audio import load_audio

sys.path.insert(0, str(Path(__file__).parents[2] / "training" / "synthesis"))
import make_name_and_number_texts as names_and_numbers
import speech_captions
from english_texts import load_texts
from transcripts import names_of, related, the_name, the_number, tokens

SCRIPT = Path(names_and_numbers.__file__).with_name("make_speech_questions.py")
TEXTS = [
    "Have you met Foster?",
    "The guards saw Foster at the gate.",
    "Bring twelve apples to the kitchen.",
    "Where is the yellow lamp?",
    "The river runs under a bridge.",
    "Somebody opened the window yesterday.",
    "We sold the piano to Mr. Hobbins.",
    "Did the doctor laugh?",
    "There are forty-two sheep in the garden.",
    "They walked home through heavy snow.",
]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("There are forty-two sheep.", "forty-two"),
        ("It costs Two hundred and fifty dollars.", "Two hundred and fifty"),
        ("Room two one seven, please.", "two one seven"),
        ("Take 3 of them.", "3"),
        ("Come at half past nine.", "nine"),
        ("Two and three are five.", None),
        ("Four, five.", None),
        ("One of them left.", None),
        ("One took four.", None),  # may be two numbers
        ("The first of six.", None),
        ("A hundred times!", None),
        ("Nobody came.", None),
    ],
)
def test_a_number_is_asked_for_where_there_is_exactly_one(text, number):
    assert the_number(tokens(text)) == number


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("I met Mary Foster here.", "Mary Foster"),
        ("I met Mr. Foster here.", "Foster"),
        ("Is it you, Foster?", "Foster"),
        ("Foster is here.", None),  # only known as a name from elsewhere
        ("I met Foster. Mary left.", None),
        ("Foster met Mary.", None),
        ("I met Mary, Foster and I'm glad.", None),
        ("I met foster and Mary.", None),
        ("I was here on Monday.", None),
        ("So the Lamp is here.", None),  # as often without a capital
        ("The lamp is out.", None),
    ],
)
def test_a_name_is_asked_for_where_there_is_exactly_one(text, name):
    names = names_of(["Here are Mary and Foster.", "Take a Lamp to the lamp on Monday."])
    assert names == {"mary", "foster"}
    assert the_name(tokens(text), names) == name


def test_forms_of_a_word_and_its_likes_are_related():
    for a, b in [("walk", "walked"), ("running", "runs"), ("took", "take"), ("night", "knight"), ("fire", "firefly")]:
        assert related(a, b) and related(b, a)
    assert not related("river", "bridge") and not related("garden", "guards")


@pytest.fixture
def files(tmp_path):
    def file(name, texts, seed):
        rows = [embedded(flac(0.8, seed + i), f"{name}{i}.flac", text=text) for i, text in enumerate(texts)]
        return write(tmp_path / f"{name}.parquet", rows)

    return [file("a", TEXTS, 0), file("b", [text.replace("the", "that") for text in TEXTS], 50)]


def make(files, output, monkeypatch, *more):
    arguments = ["--speech", *files, "--output_dir", str(output), "--per_kind", "8", "--captions", "12", "--seed", "3"]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments, *more])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    return [pq.read_table(output / f"{name}.parquet").to_pylist() for name in ("questions", "captions")]


def test_answers_follow_from_transcripts_and_say_yes_as_often_as_no(files, tmp_path, monkeypatch):
    questions, _ = make(files, tmp_path / "out", monkeypatch, "--per_kind", "20")
    asked = defaultdict(list)
    for row in questions:
        asked[row["kind"]].append(row)
    assert set(asked) == {"word", "asks", "number", "name", "first word", "last word"}
    assert {row["task"] for row in questions} == {"QA"}

    words = defaultdict(list)
    for row in asked["word"]:
        word = row["question"].split('"')[1]
        words[word].append(row["text"])
        assert (word.lower() in row["transcript"].lower().replace("?", ".").strip(".").split()) == (
            row["text"] == "yes"
        )
    # An asked word says nothing about the answer.
    assert all(Counter(answers)["yes"] == len(answers) / 2 for answers in words.values())
    for file in "ab":
        of_file = [row for row in asked["asks"] if row["audio"]["path"].startswith(file)]
        assert Counter(row["text"] for row in of_file) == {"yes": 3, "no": 3}
        assert all(("?" in row["transcript"]) == (row["text"] == "yes") for row in of_file)
    # No answer is given more than a twentieth of 20 times.
    assert sorted(row["text"] for row in asked["number"]) == ["forty-two", "twelve"]
    assert sorted(row["text"] for row in asked["name"]) == ["Foster", "Hobbins"]
    for row in asked["first word"] + asked["last word"]:
        said = row["transcript"].strip(".?").split()
        assert normalise_answer(row["text"])  # which is nothing of an article
        assert row["text"].lower() == said[0 if row["kind"] == "first word" else -1].lower()


def test_a_limit_is_shared_by_the_files(files, tmp_path, monkeypatch):
    questions, captions = make(files, tmp_path / "out", monkeypatch)
    for kind in ("word", "asks"):
        assert Counter(row["audio"]["path"][0] for row in questions if row["kind"] == kind) == {"a": 4, "b": 4}
    assert len(captions) == 12


def test_captions_name_speech_and_quote_nothing(files, tmp_path, monkeypatch):
    _, captions = make(files, tmp_path / "out", monkeypatch, "--captions", "20")
    for row in captions:
        assert row["task"] == "audiocaption" and "speak" in row["text"].replace("talk", "speak")
        assert ("phone" in row["text"]) == ("telephone" in row["kind"])
        assert ("nois" in row["text"]) == ("noise" in row["kind"])
        assert len(load_audio(row["audio"])) == 12_800
    assert len({row["kind"] for row in captions}) == 3
    said = {word for text in TEXTS for word in text.strip(".?").split() if len(word) > 3}
    captioned = {word for row in captions for word in row["text"].replace(",", "").strip(".").split()}
    assert captioned & said == {"Somebody", "There"}


def test_the_same_seed_gives_the_same(files, tmp_path, monkeypatch):
    assert make(files, tmp_path / "a", monkeypatch) == make(files, tmp_path / "b", monkeypatch)


@pytest.mark.parametrize("hz", [80, 110, 200, 330])
def test_pitch(hz):
    seconds = np.arange(16_000) / 16_000
    voice = sum(np.sin(2 * np.pi * hz * n * seconds) / n for n in range(1, 12))
    assert speech_captions.median_pitch(voice) == pytest.approx(hz, rel=0.02)
    assert speech_captions.median_pitch(np.random.default_rng(0).standard_normal(16_000)) is None
    assert speech_captions.median_pitch(np.zeros(16_000)) is None and speech_captions.median_pitch(voice[:100]) is None


def test_a_telephone_has_a_narrow_band():
    noise = np.random.default_rng(0).standard_normal(16_000)
    before, after = (np.abs(np.fft.rfft(samples)) ** 2 for samples in (noise, speech_captions.telephone(noise)))
    assert after[500:3000].sum() / before[500:3000].sum() == pytest.approx(1, abs=0.1)
    assert max(after[:150].sum() / before[:150].sum(), after[4500:].sum() / before[4500:].sum()) < 0.02


def test_names_and_templates_of_test_are_not_in_train():
    train, test = (names_and_numbers.SPLITS[split] for split in ("train", "test"))
    assert not set(train["templates"]) & set(test["templates"])
    slots = ("persons", "surnames", "places")
    of_train, of_test = ({name for slot in slots for name in split[slot].split()} for split in (train, test))
    assert not of_train & of_test


@pytest.mark.parametrize("split", ["train", "test"])
def test_sentences_have_one_name_or_number_and_are_spoken_whole(split, tmp_path):
    path = tmp_path / "texts.txt"
    names_and_numbers.main(["--split", split, "--output", str(path), "--sentences", "200", "--seed", "1"])
    texts = path.read_text(encoding="utf-8").split("\n\n")
    assert len(set(texts)) == 200
    spoken = load_texts([path], seed=0)
    assert set(spoken) <= {text.strip() for text in texts} and len(spoken) > 190
    names = names_of(texts)
    for text in texts:
        assert the_name(tokens(text), names) or the_number(tokens(text)), text


@pytest.mark.parametrize("split", ["train", "test"])
def test_every_template_gives_the_answers_that_it_holds(split):
    of_split, numbers = names_and_numbers.SPLITS[split], names_and_numbers.NUMBERS
    names = {name.lower() for slot in ("persons", "surnames", "places") for name in of_split[slot].split()}
    for template in of_split["templates"]:
        spoken = tokens(names_and_numbers.sentence(of_split, template, np.random.default_rng(0)))
        assert (the_number(spoken) is not None) == any(f"{{{slot}}}" in template for slot in numbers), template
        has_name = any(f"{{{slot}}}" in template for slot in ("person", "surname", "place"))
        assert (the_name(spoken, names) is not None) == has_name, template


@pytest.mark.parametrize(
    ("number", "words"),
    [(7, "seven"), (30, "thirty"), (42, "forty-two"), (650, "six hundred fifty"), (2015, "two thousand fifteen")],
)
def test_numbers_are_spelt(number, words):
    assert names_and_numbers.spelt(number) == words
