"""
The trained salmonn-lite-small against its bars. Slow: fetches the base parts and transcribes for minutes.

    make test-all
"""

import pytest
from conftest import ROOT
from test_nano import transcribe
from transformers import pipeline

SMALL = ROOT / "model_cards" / "salmonn-lite-small"
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("online")]


def test_the_adapter_is_small():
    assert sum(file.stat().st_size for file in SMALL.glob("*.safetensors")) <= 40e6


# What was measured in bfloat16, see docs/models.md, and half a point for other processors' rounding.
@pytest.mark.parametrize(("name", "rate"), [("bass", 0.135), ("fotaq", 0.088)])
def test_held_out_speech(shared_data, name, rate):
    from salmonn_hf import load_audio
    from salmonn_hf.data.clip_parquet import parquet_rows
    from salmonn_hf.evaluation.word_error_rate import word_error_rate

    data = parquet_rows([str(shared_data / "speech" / f"{name}-test.parquet")], "text")
    transcriber = pipeline("automatic-speech-recognition", model=str(SMALL))
    score = word_error_rate(data["text"], transcribe(transcriber, [load_audio(clip) for clip in data["audio"]]))
    print(score)
    assert score.wer <= rate + 0.005
