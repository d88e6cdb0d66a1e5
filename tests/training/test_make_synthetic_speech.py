import io
import shutil
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import soundfile as sf

sys.path.insert(0, str(Path(__file__).parents[2] / "training" / "synthesis"))
import make_synthetic_speech as synth
from english_texts import speakable

needs_engines = pytest.mark.skipif(
    any(shutil.which(program) is None for program in synth.PROGRAMS),
    reason="espeak-ng and flite are not both installed (apt-get install espeak-ng flite)",
)

TEXT = """\
A word to the wise is enough,
and they don't need two of them.
\t\t-- Somebody Famous, "A Book"
%
Dr. Jones met Mr. Smith on the road.  Every dog has its day.
The answer is 42.  NASA went to the moon.  See www.example.org for more of it.
%
The quick brown fox jumps over the lazy dog; nobody was surprised by that.
"Where are you going?" she asked the old man.
every dog has its day
"""


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "fortunes"
    path.write_text(TEXT, encoding="utf-8")
    return path


def test_texts_are_speakable_distinct_and_clean(text_file):
    texts = synth.load_texts([text_file], seed=3)
    assert "The quick brown fox jumps over the lazy dog" in texts
    assert "nobody was surprised by that." in texts
    assert any(text.endswith("they don't need two of them.") for text in texts)
    assert sum("dog has its day" in text.lower() for text in texts) == 1
    joined = " ".join(texts)
    for unwanted in ("Somebody", "Jones", "Smith", "42", "NASA", "www", '"'):
        assert unwanted not in joined
    assert texts == synth.load_texts([text_file], seed=3)


@pytest.mark.parametrize(
    "text",
    ["Word", "the Roman numeral II", "a line of XTerm here", "pst over here", "It costs $5 now", "x marks the spot"]
    + ["the dose etc.", "ipsum dolor sit amet consectetur", "aaaargh she said", " ".join(["word a"] * 11)],
)
def test_text_that_voices_would_read_differently_is_dropped(text):
    assert not speakable(text)


def test_missing_engine_names_the_package(monkeypatch, tmp_path):
    monkeypatch.setattr(synth.shutil, "which", lambda program: None)
    with pytest.raises(SystemExit, match="apt-get install espeak-ng flite"):
        synth.main(["--output", str(tmp_path / "out.parquet")])


@needs_engines
def test_parquet_is_complete_and_reproducible(text_file, tmp_path):
    tables = []
    for workers in (1, 2):
        output = tmp_path / f"{workers}.parquet"
        options = ["--clips", "12", "--seed", "5", "--workers", str(workers)]
        synth.main(["--output", str(output), "--text", str(text_file), *options])
        tables.append(pq.read_table(output))
    table = tables[0]
    assert table.equals(tables[1])

    assert table.column_names == ["audio", "text", "clip_id", "source", "speaker", "seconds"]
    assert {field.name for field in table.schema.field("audio").type} == {"bytes", "path"}
    assert b'"Audio"' in table.schema.metadata[b"huggingface"]
    assert len(table) == len(set(table["clip_id"].to_pylist())) == 12
    texts = set(synth.load_texts([text_file], seed=5))
    for row in table.to_pylist():
        assert row["text"] in texts
        assert row["source"].partition(":")[0] in ("espeak-ng", "flite")
        samples, rate = sf.read(io.BytesIO(row["audio"]["bytes"]))
        info = sf.info(io.BytesIO(row["audio"]["bytes"]))
        assert (rate, info.channels, info.format, info.subtype) == (16_000, 1, "FLAC", "PCM_16")
        assert len(samples) / rate == pytest.approx(row["seconds"], abs=1e-3)
        assert 0.05 < abs(samples).max() <= 0.91


@needs_engines
@pytest.mark.parametrize("variant", synth.STANDARD_VARIANTS + synth.OTHER_VARIANTS)
def test_espeak_variant_is_loaded(variant):
    def speak(voice):
        command = ["espeak-ng", "-v", voice, "--stdout", "--"]
        return synth.synthesize(synth.Voice(voice, voice, command), "hello there")[0].tobytes()

    assert speak(f"en-us+{variant}") != speak("en-us")
