"""`pipeline("any-to-any")` with audio in chat messages: what it answers is what processor and model answer."""

import logging

import numpy as np
import pytest
import soundfile
from conftest import noise
from transformers import pipeline

import salmonn_hf

FEW = {"max_new_tokens": 5}


@pytest.fixture(scope="module")
def talker(tiny_checkpoint):
    return pipeline("any-to-any", model=str(tiny_checkpoint), device="cpu", dtype="float32")


def conversation(*clips, text="What is it?"):
    content = [{"type": "audio", "audio": clip} for clip in clips] + [{"type": "text", "text": text}]
    return [{"role": "user", "content": content}]


def answer(tiny_checkpoint, messages):
    processor = salmonn_hf.SalmonnProcessor.from_pretrained(tiny_checkpoint)
    model = salmonn_hf.SalmonnForConditionalGeneration.from_pretrained(tiny_checkpoint)
    inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True, add_generation_prompt=True)
    output = model.generate(**inputs, **FEW, do_sample=False)
    return processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0]


def new_text(result):
    return result[0]["generated_text"] if isinstance(result, list) else result["generated_text"]


def test_one_turn(talker, tiny_checkpoint):
    messages = conversation(noise(0.7))
    result = talker(messages, return_full_text=False, generate_kwargs={"do_sample": False}, **FEW)
    expected = answer(tiny_checkpoint, messages)
    assert expected and new_text(result) == expected


def test_several_turns_and_clips_by_path_and_array(talker, tiny_checkpoint, tmp_path):
    soundfile.write(tmp_path / "a.wav", noise(0.5, 1), 16000, subtype="FLOAT")
    messages = [
        *conversation(str(tmp_path / "a.wav"), noise(0.9, 2), text="Which is longer?"),
        {"role": "assistant", "content": [{"type": "text", "text": "The second."}]},
        *conversation(noise(0.4, 3), text="And this one?"),
    ]
    result = talker(messages, return_full_text=False, generate_kwargs={"do_sample": False}, **FEW)
    assert new_text(result) == answer(tiny_checkpoint, messages)
    arrays = [*conversation(noise(0.5, 1), noise(0.9, 2), text="Which is longer?"), *messages[1:]]
    assert answer(tiny_checkpoint, arrays) == new_text(result)
    # Each clip counts: another one in the first turn changes the answer's first logits, and so do its words here.
    other = [*conversation(noise(2.5, 7), noise(0.9, 2), text="Which is longer?"), *messages[1:]]
    assert answer(tiny_checkpoint, other) != new_text(result)


def test_several_conversations(talker, tiny_checkpoint):
    conversations = [conversation(noise(0.7)), conversation(noise(1.2, 4), text="Who?")]
    results = talker(conversations, return_full_text=False, generate_kwargs={"do_sample": False}, **FEW)
    for result, messages in zip(results, conversations, strict=True):
        assert new_text(result) == answer(tiny_checkpoint, messages)


def test_full_text_is_the_conversation_with_the_answer(talker, tiny_checkpoint):
    messages = conversation(noise(0.7))
    result = talker(messages, generate_kwargs={"do_sample": False}, **FEW)
    turns = new_text(result)
    assert [turn["role"] for turn in turns] == ["user", "assistant"]
    assert turns[1]["content"] == answer(tiny_checkpoint, messages)


def test_a_clip_that_is_none_is_named(talker, tmp_path):
    with pytest.raises(salmonn_hf.AudioError, match="gone.wav"):
        talker(conversation(str(tmp_path / "gone.wav")), **FEW)
    with pytest.raises(salmonn_hf.AudioError, match="NaN"):
        talker(conversation(np.full(8000, np.nan, np.float32)), **FEW)


def test_the_model_is_among_those_that_the_pipeline_knows(tiny_checkpoint, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    with caplog.at_level(logging.WARNING, "transformers"):
        pipeline("any-to-any", model=str(tiny_checkpoint), device="cpu")
    assert "not supported" not in caplog.text
