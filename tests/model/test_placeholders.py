"""Audio placeholders in a prompt: filled at the right scale, counted, and dropped where there are fewer tokens."""

import pytest
import torch
from conftest import noise, tiny_config, tiny_model, tiny_processor

from salmonn_hf.model.placeholders import drop_spare_placeholders, embed_prompt


def test_gemma_scales_audio_as_it_scales_text():
    """Gemma multiplies every input embedding by √hidden; audio embeddings go through the same."""
    embedding = tiny_model(tiny_config("gemma2")).get_input_embeddings()
    ids, audio_embeds = torch.tensor([[5, 3, 3, 6]]), torch.randn(2, 32)
    merged = embed_prompt(ids, ids == 3, audio_embeds, embedding)
    torch.testing.assert_close(merged[0, 1:3], audio_embeds * 32**0.5)
    torch.testing.assert_close(merged[0, 0], embedding.weight[5] * 32**0.5)


@pytest.mark.parametrize("settings", [{}, {"num_layers": 1, "merged_windows": 3}])
def test_placeholder_mismatch_is_named(settings):
    config = tiny_config(**settings)
    model, processor = tiny_model(config), tiny_processor(config)
    inputs = processor(text="<|audio|>", audio=noise(1.0))
    inputs["input_ids"] = inputs["input_ids"][:, :-1]
    inputs["attention_mask"] = inputs["attention_mask"][:, :-1]
    with pytest.raises(ValueError, match="audio placeholders"):
        model(**inputs)
    with pytest.raises(ValueError, match="0 audio embeddings"):
        model(input_ids=torch.tensor([[5, 3]]))


def test_spare_placeholders_of_rows():
    """The first row's clip of three placeholders has one audio token; the second's of one and of two have one each."""
    ids = torch.tensor([[0, 5, 3, 3, 3, 6, 7], [5, 3, 6, 3, 3, 7, 8]])
    prompt = {
        "input_ids": ids,
        "is_audio": ids == 3,
        "attention_mask": torch.tensor([[0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]]),
        "labels": ids.where(ids > 5, -100),
    }
    placeholders = torch.tensor([3, 1, 2])
    shorter = drop_spare_placeholders(prompt, placeholders, torch.tensor([1, 1, 1]))
    assert shorter["input_ids"][0, -4:].tolist() == [5, 3, 6, 7]
    assert shorter["input_ids"][1].tolist() == [5, 3, 6, 3, 7, 8]
    # What is padding now holds the ids of what was dropped, but takes no audio.
    assert shorter["is_audio"].tolist() == [[0, 0, 0, 1, 0, 0], [0, 1, 0, 1, 0, 0]] and shorter["input_ids"][0, 1] == 3
    assert shorter["attention_mask"].tolist() == [[0, 0, 1, 1, 1, 1], [1] * 6]
    assert shorter["labels"].tolist() == [[-100] * 4 + [6, 7], [-100, -100, 6, -100, 7, 8]]
    plain = {"input_ids": ids, "is_audio": ids == 3, "attention_mask": None, "labels": None}
    without = drop_spare_placeholders(plain, placeholders, placeholders)
    assert torch.equal(without["input_ids"], ids) and without["labels"] is None


def test_a_prompt_without_anything_is_refused_by_the_language_model():
    with pytest.raises(ValueError, match="input_ids or inputs_embeds"):
        tiny_model()()
