"""The projector made of Whisper's decoder layers, against transformers' own decoder."""

import copy

import pytest
import torch
from conftest import tiny_config, tiny_model
from transformers import AutoModel, WhisperForConditionalGeneration

from salmonn_hf.model.configuration_whisper_projector import shared_tokens


def fill_token_ids(model, seed=0):
    """Give the CTC head tokens, which in a fresh model are all the first."""
    generator, head = torch.Generator().manual_seed(seed), model.projector.ctc_head
    for buffer in (head.token_ids, head.speech_token_ids, head.capital_token_ids):
        buffer.copy_(torch.randperm(40, generator=generator)[: len(buffer)])
    return model


def whisper_model(seed=0, **changes):
    return fill_token_ids(tiny_model(tiny_config(num_layers=1, **changes), seed), seed).eval()


def frames_of(model, lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    frames = torch.randn(len(lengths), max(lengths), model.config.audio_config.d_model, generator=generator)
    return frames, torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


def test_a_clip_in_a_batch_is_the_clip_alone():
    model, lengths = whisper_model(), [41, 3, 17, 4]
    frames, mask = frames_of(model, lengths)
    together, counts = model.projector.window_states(frames, mask)
    assert counts.tolist() == [11, 1, 5, 1]
    for clip, length, states in zip(frames, lengths, together.split(counts.tolist()), strict=True):
        alone, _ = model.projector.window_states(clip[None, :length], mask.new_ones(1, length))
        torch.testing.assert_close(alone, states, atol=1e-5, rtol=1e-5)


def test_a_query_sees_its_window_and_the_context_alone():
    model = whisper_model()
    for layer in model.projector.layers:
        torch.nn.init.zeros_(layer.self_attn.out_proj.weight)  # through which queries see one another
    frames, mask = frames_of(model, [40])
    before, _ = model.projector.window_states(frames, mask)
    frames[0, 20] += 10.0  # in window 5, which is frames 20 to 23
    after, _ = model.projector.window_states(frames, mask)
    changed = ((before - after).abs().amax(-1) > 1e-6).nonzero().flatten().tolist()
    assert changed == [3, 4, 5, 6]  # window 3 is frames 12 to 15, and sees up to 21


def test_biases_move_attention_by_distance_and_place():
    """A bias of -inf, in effect, for all but one distance or place leaves attention to that one alone."""
    model = whisper_model(window_reach=2)
    projector = model.projector
    fresh = AutoModel.from_config(model.config.projector_config)
    for name in ("window_bias", "frame_bias"):  # they begin at zero
        assert not getattr(fresh, name).any() and getattr(projector, name).any()
        torch.nn.init.zeros_(getattr(projector, name))
    frames, mask = frames_of(model, [40])
    unbiased, _ = projector.window_states(frames, mask)
    plain = whisper_model()
    plain.load_state_dict(model.state_dict(), strict=False)
    torch.testing.assert_close(unbiased, plain.projector.window_states(frames, mask)[0])

    for layer in projector.layers:
        torch.nn.init.zeros_(layer.self_attn.out_proj.weight)
    projector.frame_bias.data.fill_(-1e3)
    projector.frame_bias.data[:, :, 6 + 4] = 0.0  # the frame behind the window's last
    before, _ = model.projector.window_states(frames, mask)
    frames[0, 20] += torch.arange(frames.shape[-1])  # in window 5, and behind window 4
    after, _ = model.projector.window_states(frames, mask)
    assert ((before - after).abs().amax(-1) > 1e-6).nonzero().flatten().tolist() == [4, 5]

    model = whisper_model(window_reach=2)
    for layer in model.projector.layers:
        torch.nn.init.zeros_(layer.encoder_attn.out_proj.weight)
    model.projector.window_bias.data.fill_(-1e3)
    model.projector.window_bias.data[:, :, 3] = 0.0  # the next window
    frames, _ = frames_of(model, [40])
    before, _ = model.projector.window_states(frames, mask)
    frames[0, 20] += torch.arange(frames.shape[-1])
    after, _ = model.projector.window_states(frames, mask)
    changed = ((before - after).abs().amax(-1) > 1e-6).nonzero().flatten().tolist()
    assert changed == [4, 5, 9]  # the last has no next one, and sees all


def test_a_clip_in_a_batch_is_the_clip_alone_with_biases():
    model, lengths = whisper_model(window_reach=3), [41, 3, 17]
    torch.nn.init.normal_(model.projector.window_bias, std=0.1)
    torch.nn.init.normal_(model.projector.frame_bias, std=0.1)
    frames, mask = frames_of(model, lengths)
    together, counts = model.projector.window_states(frames, mask)
    for clip, length, states in zip(frames, lengths, together.split(counts.tolist()), strict=True):
        alone, _ = model.projector.window_states(clip[None, :length], mask.new_ones(1, length))
        torch.testing.assert_close(alone, states, atol=1e-5, rtol=1e-5)


def test_without_unused_tokens_a_model_gives_the_same(tmp_path, caplog):
    model = whisper_model()
    model.config.audio_config.bos_token_id = model.config.audio_config.vocab_size - 1
    projector, embedding = model.projector, model.get_input_embeddings()
    states, _ = projector.window_states(*frames_of(model, [40]))
    expected = projector.ctc_log_probs(states, embedding)
    used = set(projector.ctc_head.speech_token_ids.tolist() + projector.ctc_head.capital_token_ids.tolist())
    assert len(used) < projector.speech_tokens.num_embeddings
    projector.drop_unused_tokens()
    assert projector.speech_tokens.num_embeddings == len(used)
    torch.testing.assert_close(projector.ctc_log_probs(states, embedding), expected)
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert "within the vocabulary" not in caplog.text
    assert loaded.projector.speech_tokens.num_embeddings == len(used)
    torch.testing.assert_close(loaded.projector.ctc_log_probs(states, loaded.get_input_embeddings()), expected)


def test_layers_of_whisper_give_what_they_give_in_whisper():
    """One query over one window of all frames is Whisper's decoder at its first position."""
    model = whisper_model(window_context=100)
    whisper = WhisperForConditionalGeneration._from_config(model.config.audio_config).eval()
    frames, mask = frames_of(model, [4])
    start = [5, 6, 7]
    decoder, projector = whisper.model.decoder, model.projector
    states = []
    hook = decoder.layers[-1].register_forward_pre_hook(lambda _, args: states.append(args[0]))

    def from_whisper(directory):
        return whisper

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WhisperForConditionalGeneration, "from_pretrained", from_whisper)
        projector.initialize(model.get_input_embeddings(), "whisper", [(frames[0], start)])
    hook.remove()
    torch.testing.assert_close(projector.query, states[-1][0].mean(0), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(projector.ctc_head.proj.bias, model.get_input_embeddings().weight.mean(0))

    entering = states[-1][:, :1]
    projector.query.data = entering[0, 0]
    ours, _ = projector.window_states(frames, mask)
    theirs = decoder.layer_norm(decoder.layers[-1](entering, None, frames, None, use_cache=False))
    torch.testing.assert_close(ours, theirs[0], atol=1e-5, rtol=1e-5)


class Vocabulary:
    def __init__(self, *tokens):
        self.tokens = {token: index for index, token in enumerate(tokens)}

    def get_vocab(self):
        return self.tokens


OURS = Vocabulary("Ġword", "X", "ing", "Ġown", "3", "Ġa")
SPEECH = Vocabulary("ing", "Ġword", "Ġa", "ĠWord", "3", "Ing", "Ġtheirs")


def test_tokens_that_two_tokenizers_share():
    assert shared_tokens(OURS, SPEECH, set()) == [(2, 0, 0), (0, 1, 3), (5, 2, 2)]
    assert shared_tokens(OURS, SPEECH, {5, 0, 3}) == [(0, 1, 3), (5, 2, 2), (2, 0, 0)]  # those of transcripts first


def test_the_head_gets_the_shared_tokens():
    config = tiny_config(num_layers=1)
    tokens = config.projector_config.choose_tokens([5, 0], OURS, SPEECH, None)
    wanted = {"token_ids": [0, 5, 2], "speech_token_ids": [1, 2, 0], "capital_token_ids": [3, 2, 0]}
    assert tokens == {f"ctc_head.{name}": ids for name, ids in wanted.items()}
    assert (config.projector_config.ctc_vocab_size, config.projector_config.ctc_trained_size) == (3, 2)
    projector = tiny_model(config).projector
    assert all(len(projector.get_buffer(name)) == 3 for name in tokens)


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"num_layers": 99}, "num_layers is 99.*1 layers"),
        ({"num_layers": 0}, "num_layers 0"),
        ({"frame_mlp_size": 0}, "frame_mlp_size"),
        ({"ctc_vocab_size": 0}, "ctc_vocab_size"),
        ({"window_stride": 2}, "window_stride"),
    ],
)
def test_parts_that_do_not_fit(changes, named):
    with pytest.raises(ValueError, match=named):
        tiny_config(**({"num_layers": 1} | changes))


def test_its_layers_attend_as_the_projector_is_told():
    model = whisper_model(window_reach=2)
    frames, mask = frames_of(model, [40, 17])
    with_sdpa, _ = model.projector.window_states(frames, mask)
    model.set_attn_implementation("eager")
    attentions = [layer.self_attn for layer in model.projector.layers]
    assert {attention.config._attn_implementation for attention in attentions} == {"eager"}
    eager, _ = model.projector.window_states(frames, mask)
    torch.testing.assert_close(eager, with_sdpa, atol=1e-5, rtol=1e-4)
    assert {attention.config._attn_implementation for attention in copy.deepcopy(attentions)} == {"eager"}
