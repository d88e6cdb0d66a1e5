"""torch.export of each part at dynamic length, against the part itself at other lengths."""

import pytest
import torch
from conftest import noise, tiny_config, tiny_model, tiny_processor
from test_sound_summary import sound_model
from test_whisper_projector import whisper_model
from test_window_merging import merging_model
from torch.export import Dim, export
from transformers.exporters.exporter_dynamo import DynamoConfig, DynamoExporter
from transformers.exporters.utils import decompose_for_generation, decompose_multimodal

FRAMES = Dim("frames", min=40, max=1500)
LENGTHS = (40, 97, 403)
EXACT = {"atol": 0, "rtol": 0}
PROJECTORS = {
    "window Q-Former": lambda: tiny_model(tiny_config()),
    "… with MLP and CTC head": lambda: tiny_model(tiny_config(ctc_vocab_size=5, frame_mlp_size=16)),
    "… on 30 s": lambda: tiny_model(tiny_config(pad_to_30_seconds=True)),
    "… with overlapping windows": lambda: tiny_model(tiny_config(window_frames=12, window_stride=8)),
    "Whisper's decoder": lambda: whisper_model(),
    "… with position biases": lambda: whisper_model(window_reach=3),
    "… with merged windows": lambda: merging_model()[0],
    "… with names of sounds": lambda: sound_model(),
    "… with both": lambda: sound_model(merged_windows=3),
}

QUICK = ("window Q-Former", "… with merged windows")  # the others take longer than a quick test may
PARAMETERS = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in PROJECTORS]


class Projector(torch.nn.Module):
    """A projector with the token embeddings that it takes: as an argument these would be no tensor."""

    def __init__(self, model):
        super().__init__()
        self.projector, self.token_embedding = model.projector, model.get_input_embeddings()

    def forward(self, audio_frames, audio_frames_mask, sound_frames=None, sound_frames_mask=None):
        output = self.projector(audio_frames, audio_frames_mask, self.token_embedding, sound_frames, sound_frames_mask)
        return output.embeds, output.num_tokens


def frames(model, clips, length, seed=0):
    torch.manual_seed(seed)
    shape = (clips, length, model.config.audio_config.d_model)
    mask = torch.ones(shape[:2], dtype=torch.bool)
    mask[1:, length // 2 :] = False
    given = {"audio_frames": torch.randn(shape), "audio_frames_mask": mask}
    if model.config.sound_layers is not None:
        given |= {"sound_frames": torch.randn(shape), "sound_frames_mask": mask}
    return given


@pytest.mark.parametrize("clips", [1, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", PARAMETERS)
@torch.no_grad()
def test_projector(name, clips):
    model = PROJECTORS[name]()
    part = Projector(model).eval()
    given = frames(model, clips, 100)
    settings = {"dynamic_shapes": {name: {1: FRAMES} for name in given}}
    settings["prefer_deferred_runtime_asserts_over_guards"] = True
    program = export(part, (), given, **settings).module()
    for length in LENGTHS:
        given = frames(model, clips, length, seed=length)
        torch.testing.assert_close(program(**given), part(**given), **EXACT)


@torch.no_grad()
def test_encoder():
    encoder = tiny_model().get_encoder("audio")

    def given(length):
        torch.manual_seed(length)
        mask = torch.ones(2, length, dtype=torch.int64)
        mask[1, length // 2 :] = 0
        return {"input_features": torch.randn(2, 80, length), "attention_mask": mask}

    shapes = {"input_features": {2: 2 * FRAMES}, "attention_mask": {1: 2 * FRAMES}}
    program = export(encoder, (), given(200), dynamic_shapes=shapes).module()
    for length in (80, 346, 3000):
        expected = encoder(**given(length)).last_hidden_state
        torch.testing.assert_close(program(**given(length)).last_hidden_state, expected, **EXACT)


@torch.no_grad()
def test_language_model():
    model = tiny_model()

    def given(length):
        torch.manual_seed(length)
        embeds = torch.randn(1, length, model.config.text_config.hidden_size)
        return {"inputs_embeds": embeds, "attention_mask": torch.ones(1, length, dtype=torch.int64)}

    tokens = Dim("tokens", min=2, max=4000)
    shapes = {"inputs_embeds": {1: tokens}, "attention_mask": {1: tokens}, "use_cache": None}
    arguments = given(50) | {"use_cache": False}
    program = export(model.language_model, (), arguments, dynamic_shapes=shapes).module()
    for length in (2, 77, 300):
        expected = model.language_model(**given(length)).logits
        torch.testing.assert_close(program(**given(length), use_cache=False).logits, expected, **EXACT)


@pytest.mark.slow
def test_transformers_own_exporter():
    model, processor = tiny_model(), tiny_processor()
    inputs = processor.apply_transcription_request([noise(2.0)])
    parts = decompose_multimodal(model, dict(inputs)) | decompose_for_generation(model, dict(inputs))
    assert parts.keys() == {"audio_encoder", "language_model", "decode"}
    for part, given in parts.values():
        assert DynamoExporter().export(part, given, config=DynamoConfig(dynamic=True)).program is not None
