"""The CTC head over Whisper's tokens: its scores, the embeddings that it makes, and what it drafts."""

import pytest
import torch
from test_whisper_projector import whisper_model

from salmonn_hf.model import whisper_token_head
from salmonn_hf.model.quantized_layers import embedding_rows, quantize_parts


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_scores_of_all_tokens_are_the_same_with_and_without_gradients(bits):
    model = whisper_model()
    if bits:
        quantize_parts(model, {"projector.speech_tokens": {"bits": bits} | ({"group_size": 8} if bits == 4 else {})})
    head, tokens = model.projector.ctc_head, model.projector.speech_tokens
    states = torch.randn(5, head.width)
    with torch.no_grad():
        without = head.token_scores(states, tokens)
    states.requires_grad_(True)
    with_gradients = head.token_scores(states, tokens)
    assert with_gradients.requires_grad and not without.requires_grad
    torch.testing.assert_close(without, with_gradients)


def test_a_training_steps_softmax_is_over_trained_tokens_labels_and_a_sample(monkeypatch):
    monkeypatch.setattr("salmonn_hf.model.whisper_token_head.SAMPLED_TOKENS", 1)
    head, tokens = whisper_model().projector.ctc_head, whisper_model().projector.speech_tokens
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
    """With each blank so far ahead: from some lead on the tokens are not computed, which must not show."""
    model = whisper_model()
    head, states = model.projector.ctc_head, torch.randn(3, model.config.audio_config.d_model)
    head.blank.weight.data.copy_(torch.linalg.lstsq(states, torch.tensor(leads)[:, None]).solution.T)
    model.projector.ctc_head.token_ids.copy_(torch.arange(7))
    embeds, _ = model.projector.embed(states, torch.tensor([3]), model.get_input_embeddings())
    rows = model.get_input_embeddings().weight
    for state, embed in zip(states, embeds, strict=True):
        scores = [head.blank(state)[0]]
        for lower, capital in zip(head.speech_token_ids, head.capital_token_ids, strict=True):
            spellings = model.projector.speech_tokens.weight[[int(lower), int(capital)]]
            scores.append((spellings @ state).max())
        scores[1:] = [score * head.log_scale.exp() for score in scores[1:]]
        p = torch.stack(scores).softmax(-1)
        expected = p[0] * head.proj(state) + sum(x * rows[i] for x, i in zip(p[1:], head.token_ids, strict=True))
        torch.testing.assert_close(embed, expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_tokens_that_no_window_makes_likely_are_not_looked_up(monkeypatch):
    """And of those that one does, the others get none, for their embeds to be the same without it."""
    model = whisper_model()
    head, states = model.projector.ctc_head, torch.randn(3, model.config.audio_config.d_model)
    model.projector.ctc_head.token_ids.copy_(torch.arange(7))
    head.blank.bias.data.fill_(-1e3)
    head.log_scale.data.fill_(4.0)
    looked_up = []
    monkeypatch.setattr(
        whisper_token_head, "embedding_rows", lambda module, ids: looked_up.append(ids) or embedding_rows(module, ids)
    )
    together, _ = model.projector.embed(states, torch.tensor([3]), model.get_input_embeddings())
    scores = head.token_scores(states, model.projector.speech_tokens) * head.log_scale.exp()
    near = scores > scores.amax(-1, keepdim=True) - whisper_token_head.UNLIKELY
    assert looked_up[-1].tolist() == head.token_ids[near.any(0)].tolist() and not near.any(0).all()
    assert not (near == near.any(0)).all()  # else the next lines would show nothing
    for state, embed in zip(states, together, strict=True):
        alone, _ = model.projector.embed(state[None], torch.tensor([1]), model.get_input_embeddings())
        torch.testing.assert_close(alone[0], embed)
    assert (
        head.best(states, model.projector.speech_tokens) == head(states, model.projector.speech_tokens).argmax(-1)
    ).all()


def draft_of(head, states, speech_tokens):
    log_probs = head(states, speech_tokens)
    log_probs[:, 0] += whisper_token_head.DRAFT_LEAD
    return log_probs.argmax(-1)


@torch.no_grad()
def test_a_token_that_hardly_leads_the_blank_is_not_drafted():
    model = whisper_model()
    head, state = model.projector.ctc_head, torch.randn(1, model.config.audio_config.d_model)
    score = float((head.token_scores(state, model.projector.speech_tokens) * head.log_scale.exp()).max())
    head.blank.weight.zero_()
    for lead, is_drafted in ((-1, False), (1, False), (whisper_token_head.DRAFT_LEAD + 1, True)):
        head.blank.bias.fill_(score - lead)
        log_probs = head(state, model.projector.speech_tokens)
        assert bool(log_probs.argmax(-1)) == (lead > 0)
        best = head.best(state, model.projector.speech_tokens)
        assert best.tolist() == ([int(log_probs[0, 1:].argmax()) + 1] if is_drafted else [0])


def test_a_draft_needs_no_scores_beside_those_of_the_prompt(monkeypatch):
    """They are computed once for both; other states, and those of another clip, have their own."""
    model = whisper_model()
    head, embedding = model.projector.ctc_head, model.get_input_embeddings()
    states, others = torch.randn(2, 9, head.width)
    expected = [draft_of(head, each, model.projector.speech_tokens) for each in (states, others)]
    assert any(e.any() for e in expected)
    calls, scores = [], head.token_scores
    monkeypatch.setattr(head, "token_scores", lambda *args: calls.append(1) or scores(*args))
    with torch.no_grad():
        for each, best in zip((states, others), expected, strict=True):
            head.embed(each, None, model.projector.speech_tokens, embedding)
            assert torch.equal(head.best(each, model.projector.speech_tokens), best)
        assert len(calls) == 2
        assert torch.equal(head.best(states, model.projector.speech_tokens), expected[0]) and len(calls) == 3
