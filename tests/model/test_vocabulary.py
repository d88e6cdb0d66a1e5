"""The vocabulary is resized as a whole, or nothing is changed."""

import pytest
import torch
from conftest import LANGUAGE_MODELS, noise, tiny_config, tiny_model, tiny_processor, tiny_text_config
from test_window_merging import merging_model
from transformers import AutoModel

from salmonn_hf.model.quantized_layers import quantize_parts


@pytest.mark.parametrize("size", [(310,), (280,), (None, 64), (301, 64)], ids=str)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model_type", LANGUAGE_MODELS)
def test_resized_model_says_the_same(model_type, tied, size, tmp_path):
    config = tiny_config(text_config=tiny_text_config(model_type, tie_word_embeddings=tied))
    model, inputs = tiny_model(config), tiny_processor(config)(text="<|audio|> hey", audio=noise(1.0))
    before = model(**inputs).logits
    embedding = model.resize_token_embeddings(*size)
    expected = 320 if len(size) == 2 else size[0]
    assert embedding is model.get_input_embeddings() and embedding.num_embeddings == expected
    assert model.config.text_config.vocab_size == model.language_model.config.vocab_size == expected
    after = model(**inputs, labels=inputs["input_ids"])
    common = min(300, expected)
    torch.testing.assert_close(after.logits[..., :common], before[..., :common])
    assert after.logits.shape[-1] == expected and after.loss.isfinite()
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(**inputs).logits, after.logits)
    for each in (model, loaded):
        assert (each.get_output_embeddings().weight is each.get_input_embeddings().weight) == tied


@pytest.mark.parametrize("tied", [False, True])
def test_a_resized_adapter_checkpoint_holds_the_language_model(tied, tmp_path):
    """Its base part has another size."""
    config = tiny_config(
        text_config=tiny_text_config(tie_word_embeddings=tied), lora={"r": 2, "target_modules": ["q_proj"]}
    )
    model, inputs = tiny_model(config), tiny_processor(config)(text="<|audio|> hey", audio=noise(1.0))
    model.audio_tower.save_pretrained(tmp_path / "whisper")
    tower = str(tmp_path / "whisper")
    model.config.base_parts = {"audio_tower": tower, "language_model": "some/model"}
    model.resize_token_embeddings(310)
    assert model.config.base_parts == {"audio_tower": tower}
    model.save_pretrained(tmp_path / "resized")
    loaded = AutoModel.from_pretrained(tmp_path / "resized")
    torch.testing.assert_close(loaded(**inputs).logits, model(**inputs).logits)


def quantised(**settings):
    model = tiny_model(tiny_config(text_config=tiny_text_config(**settings)))
    quantize_parts(model, {"embedding": {"bits": 8}})
    return model


def asks_for_transcripts():
    model = tiny_model()
    model.generation_config.transcription_ids = [1, 3, 290]
    return model


@pytest.mark.parametrize(
    ("make", "size", "message"),
    [
        (tiny_model, 3, "audio_token_id has token 3"),
        (lambda: merging_model()[0], 39, "ctc_head.token_ids has token 39"),
        (asks_for_transcripts, 290, "transcription_ids has token 290"),
        (quantised, 310, "before it is quantised"),
        (lambda: quantised(tie_word_embeddings=True), 310, "before it is quantised"),
        (lambda: tiny_model(tiny_config(lora={"r": 2, "target_modules": ["embed_tokens"]})), 310, "merged"),
    ],
)
def test_what_cannot_be_resized_is_left_as_it_is(make, size, message):
    model = make()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        model.resize_token_embeddings(size)
    assert model.config.text_config.vocab_size == model.language_model.config.vocab_size == 300
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert model.resize_token_embeddings() is model.get_input_embeddings()
