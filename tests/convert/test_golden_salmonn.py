"""Converted checkpoints against numbers of the original SALMONN implementation, stage by stage."""

import json
from types import SimpleNamespace

import pytest
import torch
from conftest import golden_path
from golden.make_golden import thin
from safetensors.torch import load_file
from transformers import AutoConfig, AutoFeatureExtractor, AutoModel

from salmonn_hf.convert.salmonn import convert_salmonn
from salmonn_hf.model import placeholders


@pytest.fixture(scope="module", params=["gemma2", "llama"])
def case(request, tmp_path_factory):
    """The converted checkpoint of one flavour, its numbers and its clips. A clone holds those of Gemma-2."""
    description = json.loads(golden_path(f"salmonn_golden_{request.param}.json").read_text())
    out = tmp_path_factory.mktemp("golden") / request.param
    convert_salmonn(
        golden_path(f"salmonn_tiny_{request.param}.pth"),
        out,
        whisper=str(golden_path("whisper_tiny")),
        beats=golden_path("beats_tiny.pt"),
        llm=str(golden_path(f"llm_{request.param}_tiny")),
    )
    assert (
        AutoConfig.from_pretrained(out).projector_config.qformer_config.num_attention_heads
        == description["connector"]["qformer_heads"]
    )
    waveforms = load_file(golden_path("beats_golden.safetensors"))
    return SimpleNamespace(
        model=AutoModel.from_pretrained(out),
        extractor=AutoFeatureExtractor.from_pretrained(out),
        numbers=thin(load_file(golden_path(description["file"]))),
        encoders=load_file(golden_path(description["encoders_file"])),
        clips=[waveforms[f"wav_pcm16.{index}"].numpy() / 32768 for index in description["clips"]],
    )


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.inference_mode():
        yield


def assert_near(ours, golden, tolerance):
    torch.testing.assert_close(ours, golden, atol=tolerance, rtol=0)


def prompt(case, row=slice(None), target=True):
    """(input_ids, attention_mask, labels) of bos, before, audio, after and the target, as the original orders them."""
    ids = {key.split(".")[1]: value for key, value in case.numbers.items() if key.startswith("ids.")}
    masks = {key.split(".")[1]: value for key, value in case.numbers.items() if key.startswith("mask.")}
    rows = ids["before"].shape[0]
    audio = torch.full((rows, case.numbers["speech_embeds"].shape[1]), case.model.config.audio_token_id)
    head = torch.cat([ids["bos"].expand(rows, 1), ids["before"], audio], dim=1)
    input_ids = torch.cat([head, ids["after"], ids["target"]], dim=1)
    attention_mask = torch.cat([torch.ones_like(head), masks["after"], masks["target"]], dim=1)
    labels = torch.full_like(input_ids, -100)
    length = ids["target"].shape[1]
    labels[:, -length:] = ids["target"].masked_fill(masks["target"] == 0, -100)
    parts = [part if target else part[:, :-length] for part in (input_ids, attention_mask, labels)]
    if row == slice(None):
        return parts
    own = parts[1][row] == 1  # one clip alone has no padding
    return [part[row][own][None] for part in parts]


def first_step_and_greedy(case, **inputs):
    output = case.model.generate(
        **inputs, max_new_tokens=12, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    return output.logits[0], output.sequences[:, -12:]


def test_whisper_output_from_its_own_features(case):
    features = case.extractor(case.clips, return_tensors="pt")
    assert features["input_features"].shape[-1] == 3000 and features["input_features_mask"].all()
    assert features["input_values_mask"].sum(-1).tolist() == case.encoders["batch.sample_lengths"].tolist()
    assert_near(features["input_features"][..., ::32], case.encoders["batch.spectrogram_every32"], 1e-4)
    frames = case.model.encode_audio(**features)["audio_frames"]
    assert_near(frames[:, ::10], case.encoders["whisper.last_hidden_state_every10"], 1e-4)


def embed_prompt(case, input_ids, audio_embeds):
    is_audio = input_ids == case.model.config.audio_token_id
    return placeholders.embed_prompt(input_ids, is_audio, audio_embeds, case.model.get_input_embeddings())


def test_projector_from_whisper_and_stored_sound_frames(case):
    """The original lets BEATs' output at padding through, so the mask of sound frames is 1 here."""
    projector, stages = case.model.projector, {}
    hooks = [
        projector.qformer.register_forward_pre_hook(
            lambda _, args, kwargs: stages.update(windows=kwargs["encoder_hidden_states"]), with_kwargs=True
        ),
        projector.qformer.encoder.layer[0].register_forward_hook(lambda _, args, output: stages.update(layer0=output)),
        projector.qformer.register_forward_hook(lambda _, args, output: stages.update(last=output.last_hidden_state)),
    ]
    features = case.extractor(case.clips, return_tensors="pt")
    speech, sound = case.model.encode_audio(**features)["audio_frames"], case.encoders["beats.features"]
    masks = [torch.ones(frames.shape[:2], dtype=torch.bool) for frames in (speech, sound)]
    stages["joined"], _ = projector.join_frames(speech, masks[0], sound, masks[1])
    embeds, num_tokens = projector.window_states(speech, masks[0], sound, masks[1])
    for hook in hooks:
        hook.remove()
    golden = case.numbers
    clips, windows = golden["speech_embeds"].shape[:2]
    assert num_tokens.tolist() == [windows] * clips
    assert_near(stages["joined"][:, ::25], golden["connector.concat_every25"], 5e-5)
    chosen = stages["windows"].unflatten(0, (clips, windows))[:, golden["connector.window_index"]]
    assert_near(chosen, golden["connector.windows"], 5e-5)
    assert_near(stages["layer0"].view_as(golden["qformer.layer0"]), golden["qformer.layer0"], 5e-5)
    last = golden["qformer.last_hidden_state"]
    assert_near(stages["last"].view_as(last), last, 5e-5)
    assert_near(embeds.view_as(golden["speech_embeds"]), golden["speech_embeds"], 5e-5)


@pytest.mark.parametrize(("longer", "speech_frames", "sound_frames"), [("speech", 90, 70), ("audio", 100, 160)])
def test_the_shorter_stream_is_padded(case, longer, speech_frames, sound_frames):
    speech = case.numbers["direct.speech_in"][None, :speech_frames]
    sound = case.numbers["direct.audio_in"][None, :sound_frames]
    masks = [torch.ones(frames.shape[:2], dtype=torch.bool) for frames in (speech, sound)]
    embeds, _ = case.model.projector.window_states(speech, masks[0], sound, masks[1])
    assert_near(embeds, case.numbers[f"direct.longer_{longer}.speech_embeds"], 5e-5)


def test_speech_embeddings_from_the_waveform(case):
    """Each clip's own, alone and in a batch: the original's batch changes BEATs' features, ours does not."""
    clips = len(case.clips)
    batch = case.model.get_audio_features(**case.extractor(case.clips, return_tensors="pt")).pooler_output
    for row, embeds in enumerate(batch.chunk(clips)):
        golden = case.numbers[f"alone.{row}.speech_embeds"]
        alone = case.model.get_audio_features(**case.extractor(case.clips[row], return_tensors="pt")).pooler_output
        assert_near(alone, golden, 2e-3)
        assert_near(embeds, golden, 2e-3)


def test_logits_labels_and_loss_from_stored_speech_embeddings(case):
    golden = case.numbers
    input_ids, attention_mask, labels = prompt(case)
    assert torch.equal(attention_mask, golden["llm.attention_mask"]) and torch.equal(labels, golden["llm.labels"])
    inputs_embeds = embed_prompt(case, input_ids, golden["speech_embeds"].flatten(0, 1))
    scale = getattr(case.model.get_input_embeddings(), "embed_scale", 1.0)
    assert_near(inputs_embeds, golden["llm.inputs_embeds"] * scale, 1e-5)
    # The original's training counts positions through padding in the middle of a row.
    positions = torch.arange(input_ids.shape[1]).expand_as(input_ids)
    output = case.model(
        inputs_embeds=inputs_embeds, attention_mask=attention_mask, position_ids=positions, labels=labels
    )
    own = attention_mask == 1
    assert_near(output.logits[own], golden["llm.logits"][own], 5e-4)
    assert_near(output.loss, golden["llm.loss"][0], 1e-4)
    right = (output.logits[:, :-1].argmax(-1) == labels[:, 1:]).sum()
    assert right == golden["llm.correct"][0] and (labels != -100).sum() == golden["llm.total"][0]


def test_one_clip_alone_from_stored_speech_embeddings(case):
    for row in range(len(case.clips)):
        embeds = case.numbers[f"alone.{row}.speech_embeds"]
        input_ids, attention_mask, labels = prompt(case, row)
        loss = case.model(inputs_embeds=embed_prompt(case, input_ids, embeds), labels=labels).loss
        assert_near(loss, case.numbers[f"alone.{row}.loss"][0], 1e-4)
        input_ids, attention_mask, _ = prompt(case, row, target=False)
        logits, ids = first_step_and_greedy(
            case, inputs_embeds=embed_prompt(case, input_ids, embeds), attention_mask=attention_mask
        )
        assert_near(logits[0], case.numbers[f"alone.{row}.first_step_logits"], 5e-4)
        assert ids[0].tolist() == case.numbers[f"alone.{row}.greedy_ids"].tolist()


def test_generation_of_the_batch_from_stored_speech_embeddings(case):
    """
    The original's rows are padded on the right, so the shorter goes on from a padding position, which it takes for
    position 1. `generate` of today goes on counting from there; hence step by step, with the original's positions.
    """
    input_ids, attention_mask, _ = prompt(case, target=False)
    assert torch.equal(attention_mask, case.numbers["generate.attention_mask"])
    golden = case.numbers["generate.greedy_ids"]
    embeds = embed_prompt(case, input_ids, case.numbers["speech_embeds"].flatten(0, 1))
    for step in range(golden.shape[1]):
        positions = (attention_mask.cumsum(-1) - 1).masked_fill(attention_mask == 0, 1)
        output = case.model(inputs_embeds=embeds, attention_mask=attention_mask, position_ids=positions)
        if step == 0:
            assert_near(output.logits[:, -1], case.numbers["generate.first_step_logits"], 5e-4)
        ids = output.logits[:, -1:].argmax(-1)
        assert torch.equal(ids[:, 0], golden[:, step])
        embeds = torch.cat([embeds, embed_prompt(case, ids, None)], dim=1)
        attention_mask = torch.cat([attention_mask, torch.ones_like(ids)], dim=1)


def test_loss_logits_and_ids_from_the_waveform(case):
    for row, clip in enumerate(case.clips):
        features = case.extractor(clip, return_tensors="pt")
        input_ids, attention_mask, labels = prompt(case, row)
        loss = case.model(input_ids=input_ids, attention_mask=attention_mask, labels=labels, **features).loss
        assert_near(loss, case.numbers[f"alone.{row}.loss"][0], 2e-3)
        input_ids, attention_mask, _ = prompt(case, row, target=False)
        logits, ids = first_step_and_greedy(case, input_ids=input_ids, attention_mask=attention_mask, **features)
        assert_near(logits[0], case.numbers[f"alone.{row}.first_step_logits"], 1e-2)
        assert ids[0].tolist() == case.numbers[f"alone.{row}.greedy_ids"].tolist()
