"""The connector made of Whisper's decoder layers, against transformers' own decoder."""

import pytest
import torch
from conftest import tiny_config, tiny_model
from transformers import AutoModel, WhisperForConditionalGeneration

from salmonn_hf.model import speech_decoder
from salmonn_hf.model.quantized_layers import embedding_rows, quantize_parts
from salmonn_hf.model.speech_decoder import drop_unused_tokens, shared_tokens, start_from_whisper

WINDOWS = {"window_frames": 4, "window_stride": 4, "queries_per_window": 1}


def decoder_config(**changes):
    settings = {"speech_decoder_layers": 1, "window_context": 6, "frame_mlp_size": 16, "ctc_vocab_size": 7}
    return tiny_config(**WINDOWS, **(settings | changes))


def decoder_model(seed=0):
    model = tiny_model(decoder_config(), seed)
    generator = torch.Generator().manual_seed(seed)
    for buffer in (model.ctc_head.token_ids, model.ctc_head.speech_token_ids, model.ctc_head.capital_token_ids):
        buffer.copy_(torch.randperm(40, generator=generator)[:7])
    return model.eval()


def frames_of(model, lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    frames = torch.randn(len(lengths), max(lengths), model.config.audio_config.d_model, generator=generator)
    return frames, torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


def test_a_clip_in_a_batch_is_the_clip_alone():
    model, lengths = decoder_model(), [41, 3, 17, 4]
    frames, mask = frames_of(model, lengths)
    together, counts = model.connect_audio(frames, mask)
    assert counts.tolist() == [11, 1, 5, 1]
    for clip, length, states in zip(frames, lengths, together.split(counts.tolist()), strict=True):
        alone, _ = model.connect_audio(clip[None, :length], mask.new_ones(1, length))
        torch.testing.assert_close(alone, states, atol=1e-5, rtol=1e-5)


def test_a_query_sees_its_window_and_the_context_alone():
    model = decoder_model()
    for layer in model.connector.layers:
        torch.nn.init.zeros_(layer.self_attn.out_proj.weight)  # through which queries see one another
    frames, mask = frames_of(model, [40])
    before, _ = model.connect_audio(frames, mask)
    frames[0, 20] += 10.0  # in window 5, which is frames 20 to 23
    after, _ = model.connect_audio(frames, mask)
    changed = ((before - after).abs().amax(-1) > 1e-6).nonzero().flatten().tolist()
    assert changed == [3, 4, 5, 6]  # window 3 is frames 12 to 15, and sees up to 21


def test_biases_move_attention_by_distance_and_place():
    """A bias of -inf, in effect, for all but one distance or place leaves attention to that one alone."""
    model = tiny_model(decoder_config(window_reach=2), 0).eval()
    connector = model.connector
    connector.reset_parameters()  # biases begin at zero
    frames, mask = frames_of(model, [40])
    unbiased, _ = model.connect_audio(frames, mask)
    plain = decoder_model()
    plain.load_state_dict(model.state_dict(), strict=False)
    torch.testing.assert_close(unbiased, plain.connect_audio(frames, mask)[0])

    for layer in connector.layers:
        torch.nn.init.zeros_(layer.self_attn.out_proj.weight)
    connector.frame_bias.data.fill_(-1e3)
    connector.frame_bias.data[:, :, 6 + 4] = 0.0  # the frame behind the window's last
    before, _ = model.connect_audio(frames, mask)
    frames[0, 20] += torch.arange(frames.shape[-1])  # in window 5, and behind window 4
    after, _ = model.connect_audio(frames, mask)
    assert ((before - after).abs().amax(-1) > 1e-6).nonzero().flatten().tolist() == [4, 5]

    model = tiny_model(decoder_config(window_reach=2), 0).eval()
    for layer in model.connector.layers:
        torch.nn.init.zeros_(layer.encoder_attn.out_proj.weight)
    model.connector.window_bias.data.fill_(-1e3)
    model.connector.window_bias.data[:, :, 3] = 0.0  # the next window
    frames, _ = frames_of(model, [40])
    before, _ = model.connect_audio(frames, mask)
    frames[0, 20] += torch.arange(frames.shape[-1])
    after, _ = model.connect_audio(frames, mask)
    changed = ((before - after).abs().amax(-1) > 1e-6).nonzero().flatten().tolist()
    assert changed == [4, 5, 9]  # the last has no next one, and sees all


def test_a_clip_in_a_batch_is_the_clip_alone_with_biases():
    model, lengths = tiny_model(decoder_config(window_reach=3), 0).eval(), [41, 3, 17]
    torch.nn.init.normal_(model.connector.window_bias, std=0.1)
    torch.nn.init.normal_(model.connector.frame_bias, std=0.1)
    frames, mask = frames_of(model, lengths)
    together, counts = model.connect_audio(frames, mask)
    for clip, length, states in zip(frames, lengths, together.split(counts.tolist()), strict=True):
        alone, _ = model.connect_audio(clip[None, :length], mask.new_ones(1, length))
        torch.testing.assert_close(alone, states, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_scores_of_all_tokens_are_the_same_with_and_without_gradients(bits):
    model = decoder_model()
    if bits:
        quantize_parts(model, {"speech_tokens": {"bits": bits} | ({"group_size": 8} if bits == 4 else {})})
    head, tokens = model.ctc_head, model.speech_tokens
    states = torch.randn(5, head.width)
    with torch.no_grad():
        without = head.token_scores(states, tokens)
    states.requires_grad_(True)
    with_gradients = head.token_scores(states, tokens)
    assert with_gradients.requires_grad and not without.requires_grad
    torch.testing.assert_close(without, with_gradients)


def test_without_unused_tokens_a_model_hears_the_same(tmp_path, caplog):
    model = decoder_model()
    model.config.audio_config.bos_token_id = model.config.audio_config.vocab_size - 1
    head, clip = model.ctc_head, (torch.randn(1, 40, model.config.audio_config.d_model), torch.ones(1, 40).bool())
    states, _ = model.connect_audio(*clip)
    expected = head(states, model.speech_tokens)
    used = set(head.speech_token_ids.tolist() + head.capital_token_ids.tolist())
    assert len(used) < model.speech_tokens.num_embeddings
    drop_unused_tokens(model)
    assert model.speech_tokens.num_embeddings == len(used)
    torch.testing.assert_close(head(states, model.speech_tokens), expected)
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert "within the vocabulary" not in caplog.text
    torch.testing.assert_close(loaded.ctc_head(states, loaded.speech_tokens), expected)


def test_layers_of_whisper_read_as_they_do_in_whisper():
    """One query over one window of all frames is Whisper's decoder at its first position."""
    model = decoder_model()
    whisper = WhisperForConditionalGeneration._from_config(model.config.audio_config).eval()
    frames, mask = frames_of(model, [4])
    start = [5, 6, 7]
    model.connector.window_context = 100
    decoder = whisper.model.decoder
    states = []
    hook = decoder.layers[-1].register_forward_pre_hook(lambda _, args: states.append(args[0]))

    def from_whisper(directory):
        return whisper

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WhisperForConditionalGeneration, "from_pretrained", from_whisper)
        start_from_whisper(model, "whisper", [(frames[0], start)])
    hook.remove()
    torch.testing.assert_close(model.connector.query, states[-1][0].mean(0), atol=1e-6, rtol=1e-6)

    entering = states[-1][:, :1]
    model.connector.query.data = entering[0, 0]
    ours, _ = model.connect_audio(frames, mask)
    theirs = decoder.layer_norm(decoder.layers[-1](entering, None, frames, None, use_cache=False))
    torch.testing.assert_close(ours, theirs[0], atol=1e-5, rtol=1e-5)


def test_training_chooses_among_trained_tokens_labels_and_a_sample(monkeypatch):
    monkeypatch.setattr("salmonn_hf.model.speech_decoder.SAMPLED_TOKENS", 1)
    head, tokens = decoder_model().ctc_head, decoder_model().speech_tokens
    head.num_trained = 3
    states = torch.randn(5, head.blank.in_features)
    labels = torch.tensor([[6, 0], [2, -100]])
    for seed in range(8):
        torch.manual_seed(seed)
        classes, places = head.training_classes(labels)
        assert {0, 1, 2, 6} <= set(classes.tolist()) and len(classes) in (4, 5)
        assert places[1, 1] == -100 and classes[places[labels >= 0]].tolist() == [6, 0, 2]
        chosen = torch.cat([torch.zeros(1, dtype=torch.int64), classes + 1])
        expected = head(states, tokens)[:, chosen].log_softmax(-1)
        torch.testing.assert_close(head(states, tokens, classes), expected)


@pytest.mark.parametrize("leads", [(0.0, 0.0, 0.0), (0.0, 60.0, 5.0), (60.0, 60.0, 60.0)])
def test_embeds_are_the_mean_of_token_embeddings(leads):
    """With each blank so far ahead: from some lead on the tokens are left out, which must not show."""
    model = decoder_model()
    head, states = model.ctc_head, torch.randn(3, model.config.audio_config.d_model)
    head.blank.weight.data.copy_(torch.linalg.lstsq(states, torch.tensor(leads)[:, None]).solution.T)
    model.ctc_head.token_ids.copy_(torch.arange(7))
    embeds, _ = model.embed_audio(states, torch.tensor([3]))
    rows = model.get_input_embeddings().weight
    for state, embed in zip(states, embeds, strict=True):
        scores = [head.blank(state)[0]]
        for lower, capital in zip(head.speech_token_ids, head.capital_token_ids, strict=True):
            scores.append(
                torch.maximum(state @ model.speech_tokens.weight[lower], state @ model.speech_tokens.weight[capital])
            )
        scores[1:] = [score * head.log_scale.exp() for score in scores[1:]]
        p = torch.stack(scores).softmax(-1)
        expected = p[0] * head.proj(state) + sum(x * rows[i] for x, i in zip(p[1:], head.token_ids, strict=True))
        torch.testing.assert_close(embed, expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_tokens_that_no_window_makes_likely_are_not_looked_up(monkeypatch):
    """And of those that one does, the others get none, for their embeds to be the same without it."""
    model = decoder_model()
    head, states = model.ctc_head, torch.randn(3, model.config.audio_config.d_model)
    model.ctc_head.token_ids.copy_(torch.arange(7))
    head.blank.bias.data.fill_(-1e3)
    head.log_scale.data.fill_(4.0)
    looked_up = []
    monkeypatch.setattr(
        speech_decoder, "embedding_rows", lambda module, ids: looked_up.append(ids) or embedding_rows(module, ids)
    )
    together, _ = model.embed_audio(states, torch.tensor([3]))
    scores = head.token_scores(states, model.speech_tokens) * head.log_scale.exp()
    near = scores > scores.amax(-1, keepdim=True) - speech_decoder.UNLIKELY
    assert looked_up[-1].tolist() == head.token_ids[near.any(0)].tolist() and not near.any(0).all()
    assert not (near == near.any(0)).all()  # else the next lines would show nothing
    for state, embed in zip(states, together, strict=True):
        torch.testing.assert_close(model.embed_audio(state[None], torch.tensor([1]))[0][0], embed)
    assert (head.best(states, model.speech_tokens) == head(states, model.speech_tokens).argmax(-1)).all()


def draft_of(head, states, speech_tokens):
    log_probs = head(states, speech_tokens)
    log_probs[:, 0] += speech_decoder.DRAFT_LEAD
    return log_probs.argmax(-1)


@torch.no_grad()
def test_a_token_that_hardly_leads_the_blank_is_not_drafted():
    model = decoder_model()
    head, state = model.ctc_head, torch.randn(1, model.config.audio_config.d_model)
    score = float((head.token_scores(state, model.speech_tokens) * head.log_scale.exp()).max())
    head.blank.weight.zero_()
    for lead, is_drafted in ((-1, False), (1, False), (speech_decoder.DRAFT_LEAD + 1, True)):
        head.blank.bias.fill_(score - lead)
        log_probs = head(state, model.speech_tokens)
        assert bool(log_probs.argmax(-1)) == (lead > 0)
        best = head.best(state, model.speech_tokens)
        assert best.tolist() == ([int(log_probs[0, 1:].argmax()) + 1] if is_drafted else [0])


def test_a_draft_is_read_off_the_scores_of_the_prompt(monkeypatch):
    """They are computed once for both; other states, and those of another clip, have their own."""
    model = decoder_model()
    head, embedding = model.ctc_head, model.get_input_embeddings()
    states, others = torch.randn(2, 9, head.width)
    expected = [draft_of(head, each, model.speech_tokens) for each in (states, others)]
    assert any(e.any() for e in expected)
    calls, scores = [], head.token_scores
    monkeypatch.setattr(head, "token_scores", lambda *args: calls.append(1) or scores(*args))
    with torch.no_grad():
        for each, best in zip((states, others), expected, strict=True):
            head.embed(each, model.speech_tokens, embedding)
            assert torch.equal(head.best(each, model.speech_tokens), best)
        assert len(calls) == 2
        assert torch.equal(head.best(states, model.speech_tokens), expected[0]) and len(calls) == 3


def test_both_losses_reach_the_connector():
    model = decoder_model().train()
    frames, mask = frames_of(model, [40, 16])
    counts = [10, 4]
    ids = torch.full((2, 13), model.config.audio_token_id + 1)
    for row, count in zip(ids, counts, strict=True):
        row[:count] = model.config.audio_token_id
    labels = ids.where(ids != model.config.audio_token_id, -100)
    labels_ctc = torch.tensor([[0, 1, 2], [3, -100, -100]])
    for kwargs in ({"input_ids": ids, "labels": labels}, {"ctc_labels": labels_ctc}):
        model.zero_grad()
        loss = model(audio_frames=frames, audio_frames_mask=mask, **kwargs).loss
        loss.backward()
        assert loss.isfinite() and model.connector.layers[0].fc1.weight.grad.abs().sum() > 0


def test_tokens_that_two_tokenizers_share():
    class Vocabulary:
        def __init__(self, *tokens):
            self.tokens = {token: index for index, token in enumerate(tokens)}

        def get_vocab(self):
            return self.tokens

    ours = Vocabulary("Ġword", "X", "ing", "Ġown", "3", "Ġa")
    speech = Vocabulary("ing", "Ġword", "Ġa", "ĠWord", "3", "Ing", "Ġtheirs")
    assert shared_tokens(ours, speech) == [(2, 0, 0), (0, 1, 3), (5, 2, 2)]


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"speech_decoder_layers": 99}, "99"),
        ({"frame_mlp_size": 0}, "frame_mlp_size"),
        ({"ctc_vocab_size": 0}, "ctc_vocab_size"),
        ({"window_stride": 2}, "window_stride"),
    ],
)
def test_parts_that_do_not_fit(changes, named):
    with pytest.raises(ValueError, match=named):
        tiny_config(**(WINDOWS | {"speech_decoder_layers": 1, "frame_mlp_size": 16, "ctc_vocab_size": 7} | changes))
