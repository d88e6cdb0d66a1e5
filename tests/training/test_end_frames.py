"""The end frames: learnt from what Whisper itself writes where silence follows, everything else left as it is."""

import torch
from conftest import noise, tiny_config, tiny_model, tiny_processor

from salmonn_hf.model.speech_decoder import SalmonnWhisperDecoder
from salmonn_hf.training import end_frames


def clips_of(count):
    extractor = tiny_processor(tiny_config(num_end_frames=3)).feature_extractor
    waveforms = [noise(0.3 + 0.1 * clip, clip) for clip in range(count)]
    features = [extractor([waveform], return_tensors="pt")["input_features"][0] for waveform in waveforms]
    return [{"clip": {"input_features": clip}} for clip in features]


def test_they_learn_the_transcripts_and_nothing_else_changes(monkeypatch):
    monkeypatch.setattr(end_frames, "FIT_CLIPS", 4)
    monkeypatch.setattr(end_frames, "FIT_STEPS", 40)
    taught = [torch.tensor(ids) for ids in ([11, 12, 90], [30, 90], [25, 26, 27, 90], [40, 41])]
    given = iter(taught)
    states = torch.randn(4, 5, 16) * 7 + 3
    monkeypatch.setattr(
        end_frames, "padded_transcript", lambda *_: (ids := next(given), states[len(ids) - 1][: len(ids)])
    )
    model, learnt = tiny_model(tiny_config(num_end_frames=3)), []
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    loss = end_frames.transcript_loss
    monkeypatch.setattr(end_frames, "transcript_loss", lambda *given: learnt.append(given[2]) or loss(*given))
    clips = [*clips_of(3), {"path": "broken", "skipped": "damaged"}, *clips_of(1)]
    last = end_frames.fit_end_frames(model, clips)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {"projector.end_frames", "projector.state_norm.weight", "projector.state_norm.bias"}
    taught_ids = {tuple(ids.tolist()) for batch in learnt for ids in batch}
    assert taught_ids == {(11, 12, 90), (30, 90), (25, 26, 27, 90)}  # the other goes on without end
    fresh = tiny_model(tiny_config(num_end_frames=3))
    frames = [
        fresh.encode_speech(clip["clip"]["input_features"][None])["audio_frames"][0].detach() for clip in clips_of(3)
    ]
    assert last < loss(fresh.projector, frames, taught[:3]).item()
    assert not model.projector.end_frames.requires_grad


def test_the_teacher_hears_silence_behind_the_clip(monkeypatch):
    monkeypatch.setattr(SalmonnWhisperDecoder, "no_speech", lambda *_: torch.full((1,), -1e9))
    model = tiny_model(tiny_config(num_end_frames=3))
    features, seen = clips_of(1)[0]["clip"]["input_features"][None], []
    model.audio_tower.register_forward_pre_hook(lambda _, args, kwargs: seen.append(args[0]), with_kwargs=True)
    ids, _ = end_frames.padded_transcript(model, features)
    assert seen[0].shape[-1] == features.shape[-1] + end_frames.PADDING
    torch.testing.assert_close(seen[0][..., : features.shape[-1]], features)
    # As log-mel frames of a clip padded with zeros: eight decades below the loudest.
    assert (seen[0][..., features.shape[-1] :] == features.max() - 2).all()
    frames = model.audio_tower(seen[0], attention_mask=torch.ones_like(seen[0][:, 0])).last_hidden_state
    rows = torch.cat([torch.tensor(model.projector.config.prompt_ids), ids[:-1]])[None]
    decoder = model.projector.decoder
    states = decoder(rows, frames, torch.zeros(1, 1, 1, frames.shape[1]))[0, -len(ids) :]
    scores = states @ decoder.embed_tokens.weight.T
    scores[:, [7, *range(91, 100)]] = -torch.inf
    scores[0, [8, 90]] = -torch.inf
    assert scores.argmax(-1).tolist() == ids.tolist()
