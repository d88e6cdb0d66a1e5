"""What every projector must do, shown of each."""

import pytest
import torch
from conftest import noise, tiny_config, tiny_model, tiny_processor
from test_modeling_salmonn import without_dropout
from transformers import AutoModel

from salmonn_hf import SalmonnForConditionalGeneration
from salmonn_hf.model.projector import SalmonnProjector
from salmonn_hf.model.whisper_token_head import WORDLESS

SOUNDS = {"sound_layers": [1, 2]}
SUMMARY = {"sound_summary_size": 8, "sound_kinds": 5, "sound_name_size": 4}
CONFIGS = {
    "window Q-Former": lambda: without_dropout(ctc_vocab_size=7, frame_mlp_size=12),
    "window Q-Former with sounds": lambda: without_dropout(ctc_vocab_size=7, **SOUNDS),
    "window Q-Former that overlaps": lambda: without_dropout(window_stride=3, queries_per_window=1, ctc_vocab_size=7),
    "Whisper": lambda: tiny_config(num_layers=1, window_reach=2),
    "Whisper with sounds, merging": lambda: tiny_config(num_layers=1, merged_windows=3, **SOUNDS, **SUMMARY),
}
LENGTHS = [41, 3, 17, 64]
# What takes no part in a loss: of the next token, the Q-Former's CTC head; of alignment, what only embeddings need;
# of both, Whisper's token embeddings and what chooses among kinds of sound.
WITHOUT_GRADIENT = {
    ("window Q-Former", "next token"): ("ctc_head.",),
    ("window Q-Former", "alignment"): (),
    ("Whisper", "next token"): ("speech_tokens.", "sound_summary.norm.", "sound_summary.mlp."),
    ("Whisper", "alignment"): ("speech_tokens.", "sound_summary.", "ctc_head.proj."),
}


@pytest.fixture(params=CONFIGS)
def model(request):
    """With tokens for its CTC head, and a name for each kind of sound."""
    model = tiny_model(CONFIGS[request.param]())
    generator, head = torch.Generator().manual_seed(0), model.projector.ctc_head
    for buffer in head.buffers():
        buffer.copy_(torch.randperm(40, generator=generator)[: len(buffer)])
    if (summary := getattr(model.projector, "sound_summary", None)) is not None:
        summary.names.copy_(torch.randint(5, 40, summary.names.shape, generator=generator))
        torch.nn.init.normal_(summary.marker)
    if "merging" in request.param:  # then about half of the windows are without a word
        with torch.no_grad():
            head.blank.weight.mul_(20)
            states, _ = model.projector.window_states(**clips(model))
            blanks = model.projector.ctc_log_probs(states, model.get_input_embeddings())[:, 0].exp()
            head.blank.bias.add_(torch.tensor(WORDLESS).logit() - blanks.logit().median())
    return model


def clips(model, lengths=LENGTHS, seed=0):
    """Frames as `encode_audio` returns them, by name."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    names = ["audio"] + ["sound"] * (model.config.sound_layers is not None)
    frames = {f"{name}_frames": torch.randn(*mask.shape, 16, generator=generator) for name in names}
    return frames | {f"{name}_frames_mask": mask for name in names}


def test_it_is_built_from_its_config_alone(model):
    config = model.config.projector_config
    projector = AutoModel.from_config(config)
    assert type(projector) is type(model.projector) and isinstance(projector, SalmonnProjector)
    assert projector.config.model_type == config.model_type and model.projector.config is config
    shapes = {name: value.shape for name, value in projector.state_dict().items()}
    assert shapes == {name: value.shape for name, value in model.projector.state_dict().items()}
    assert all(value.isfinite().all() for value in projector.state_dict().values())


@torch.no_grad()
def test_forward_gives_what_is_documented(model):
    projector, embedding, frames = model.projector, model.get_input_embeddings(), clips(model)
    output = projector(token_embedding=embedding, return_ctc=True, **frames)
    processor = tiny_processor(model.config)
    assert output.num_states.tolist() == [processor.num_audio_tokens(length) for length in LENGTHS]
    assert len(output.states) == output.num_states.sum() and output.states.ndim == 2
    assert output.embeds.shape == (output.num_tokens.sum(), 32)
    assert (output.num_tokens > 0).all() and (output.num_tokens <= output.num_states).all()
    fewer = getattr(projector.config, "merged_windows", 1) > 1
    assert (output.num_tokens.sum() < output.num_states.sum()) == fewer
    assert output.ctc_log_probs.shape == (len(output.states), 1 + 7)
    assert output.ctc_log_probs.dtype == torch.float32
    torch.testing.assert_close(output.ctc_log_probs.exp().sum(-1), torch.ones(len(output.states)))
    assert output.ctc_log_probs.argmax(-1).unique().numel() > 1

    plain = projector(token_embedding=embedding, **frames)
    assert plain.ctc_log_probs is None and torch.equal(plain.embeds, output.embeds)
    states, num_states = projector.window_states(**frames)
    assert torch.equal(states, output.states) and torch.equal(num_states, output.num_states)


def test_without_a_head_there_are_no_log_probabilities():
    model = tiny_model()
    assert not model.projector.has_ctc_head
    assert model.projector(token_embedding=None, return_ctc=True, **clips(model)).ctc_log_probs is None


@torch.no_grad()
def test_a_clip_in_a_batch_is_the_clip_alone(model):
    embedding, frames = model.get_input_embeddings(), clips(model)
    together = model.projector(token_embedding=embedding, return_ctc=True, **frames)
    embeds = together.embeds.split(together.num_tokens.tolist())
    log_probs = together.ctc_log_probs.split(together.num_states.tolist())
    for row, length in enumerate(LENGTHS):
        own = {name: value[row : row + 1, :length] for name, value in frames.items()}
        alone = model.projector(token_embedding=embedding, return_ctc=True, **own)
        torch.testing.assert_close(embeds[row], alone.embeds, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(log_probs[row], alone.ctc_log_probs, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_saved_and_loaded_it_gives_the_same(model, tmp_path):
    """As a part of the model, and on its own."""
    embedding, frames = model.get_input_embeddings(), clips(model)
    expected = model.projector(token_embedding=embedding, return_ctc=True, **frames)
    model.save_pretrained(tmp_path / "model")
    model.projector.save_pretrained(tmp_path / "projector")
    in_model = SalmonnForConditionalGeneration.from_pretrained(tmp_path / "model").projector
    for projector in (in_model, AutoModel.from_pretrained(tmp_path / "projector")):
        found = projector.eval()(token_embedding=embedding, return_ctc=True, **frames)
        assert torch.equal(found.embeds, expected.embeds) and torch.equal(found.num_tokens, expected.num_tokens)
        assert torch.equal(found.ctc_log_probs, expected.ctc_log_probs)


@pytest.mark.parametrize("loss", ["next token", "alignment"])
def test_gradients_reach_all_that_a_loss_depends_on(request, model, loss):
    model.train()
    frames, inputs = clips(model), {"ctc_labels": torch.tensor([[0, 1, 2], [3, -100, -100], [2, 4, -100], [6, 1, 1]])}
    if loss == "next token":
        counts = model.projector.window_states(**frames)[1].tolist()
        ids = torch.full((len(counts), max(counts) + 3), model.config.audio_token_id + 1)
        for row, count in zip(ids, counts, strict=True):
            row[:count] = model.config.audio_token_id
        inputs = {"input_ids": ids, "labels": ids.where(ids != model.config.audio_token_id, -100)}
    output = model(**frames, **inputs)
    assert output.loss.isfinite()
    output.loss.backward()
    kind = "Whisper" if "Whisper" in request.node.name else "window Q-Former"
    for name, parameter in model.projector.named_parameters():
        if not name.endswith("key.bias"):  # on which no softmax depends
            is_reached = parameter.grad is not None and bool(parameter.grad.any())
            assert is_reached != name.startswith(WITHOUT_GRADIENT[kind, loss]), name


@torch.no_grad()
def test_its_transcripts_are_greedy_ctc(model):
    embedding, frames = model.get_input_embeddings(), clips(model)
    output = model.projector(token_embedding=embedding, return_ctc=True, **frames)
    transcripts = model.projector.ctc_transcripts(output.states, output.num_states, embedding)
    token_ids = model.projector.ctc_head.token_ids.tolist()
    assert any(transcripts)
    for clip, transcript in zip(output.ctc_log_probs.split(output.num_states.tolist()), transcripts, strict=True):
        path = clip.argmax(-1).tolist()
        by_hand = [b for a, b in zip([0, *path], path, strict=False) if b > 0 and a != b]
        assert transcript == [token_ids[index - 1] for index in by_hand]


@torch.no_grad()
def test_all_places_of_audio_in_the_model_use_it(model):
    """`forward`, `generate` and `get_audio_features` take the same embeddings, of features as of frames."""
    processor = tiny_processor(model.config)
    inputs = processor.apply_transcription_request([noise(0.7), noise(2.0)])
    features = {name: inputs[name] for name in ("input_features", "input_features_mask")}
    frames = model.encode_audio(**features)
    expected = model.projector(token_embedding=model.get_input_embeddings(), **frames).embeds
    torch.testing.assert_close(model.get_audio_features(**features).pooler_output, expected)
    torch.testing.assert_close(model.project_audio(**features).embeds, expected)
    text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    for audio in (features, frames):
        torch.testing.assert_close(model(**text, **audio).audio_embeds, expected)
    options = {"max_new_tokens": 3, "do_sample": False}
    assert torch.equal(model.generate(**text, **features, **options), model.generate(**text, **frames, **options))


@pytest.mark.parametrize("settings", [{"ctc_vocab_size": 7}, {"num_layers": 1}], ids=["qformer", "whisper"])
def test_a_model_made_without_memory_begins_without_tokens(settings):
    with torch.device("meta"):
        model = SalmonnForConditionalGeneration(tiny_config(**settings))
    model.to_empty(device="cpu")
    head = model.projector.ctc_head
    for values in head.buffers():
        values.fill_(99)  # as memory that nobody has written may hold
    model.init_weights()
    assert not any(values.any() for values in head.buffers())
