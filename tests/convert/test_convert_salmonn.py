"""Original SALMONN checkpoints in and out: any sizes, every tensor accounted for, bad input refused."""

import re
import shutil

import pytest
import torch
from conftest import noise, tiny_config, tiny_text_config, tiny_tokenizer
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModel,
    AutoModelForCausalLM,
    AutoProcessor,
    WhisperForConditionalGeneration,
)

from salmonn_hf.convert.__main__ import main
from salmonn_hf.convert.beats import export_beats
from salmonn_hf.convert.export_salmonn import export_salmonn
from salmonn_hf.convert.salmonn import convert_salmonn
from salmonn_hf.model.configuration_beats import BeatsConfig
from salmonn_hf.model.modeling_beats import BeatsForAudioClassification, BeatsModel

WHISPER_WIDTH, BEATS_WIDTH, LLM_WIDTH = 16, 24, 32
HIDDEN, HEADS, FFN = 40, 5, 56
BIAS_TABLE = "self_attn.relative_attention_bias.weight"
SETTINGS = {"lora_rank": 4, "lora_alpha": 16, "second_per_window": 0.25, "second_stride": 0.1}


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Whisper, BEATs and language models of sizes that no published checkpoint has."""
    root = tmp_path_factory.mktemp("parts")
    torch.manual_seed(1)
    WhisperForConditionalGeneration(tiny_config().audio_config).save_pretrained(root / "whisper")
    for name, model_type in (("llama", "llama"), ("gemma2", "gemma2")):
        AutoModelForCausalLM.from_config(tiny_text_config(model_type)).save_pretrained(root / name)
    AutoModelForCausalLM.from_config(tiny_text_config()).save_pretrained(root / "with_tokenizer")
    tiny_tokenizer().save_pretrained(root / "with_tokenizer")
    config = BeatsConfig(
        embed_dim=8, hidden_size=BEATS_WIDTH, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        num_conv_pos_embedding_groups=4,
    )  # fmt: skip
    BeatsModel(config).save_pretrained(root / "beats")
    export_beats(root / "beats", root / "beats.pt")
    return root


def original(llm="llama", sound=True, queries=2, layers=3, rank=4, targets=("q_proj", "v_proj"), seed=0):
    """A random checkpoint in the original's layout, key by key."""
    generator = torch.Generator().manual_seed(seed)
    width = WHISPER_WIDTH + sound * BEATS_WIDTH
    shapes = {"speech_query_tokens": (1, queries, HIDDEN)}

    def linear(name, outputs, inputs):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (outputs, inputs), (outputs,)

    def norm(name, size):
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (size,)

    norm("ln_speech", WHISPER_WIDTH)
    if sound:
        norm("ln_audio", BEATS_WIDTH)
    norm("speech_Qformer.bert.embeddings.LayerNorm", HIDDEN)
    for n in range(layers):
        layer = f"speech_Qformer.bert.encoder.layer.{n}"
        for block, inputs in (("attention", HIDDEN), ("crossattention", width)):
            linear(f"{layer}.{block}.self.query", HIDDEN, HIDDEN)
            linear(f"{layer}.{block}.self.key", HIDDEN, inputs)
            linear(f"{layer}.{block}.self.value", HIDDEN, inputs)
            linear(f"{layer}.{block}.output.dense", HIDDEN, HIDDEN)
            norm(f"{layer}.{block}.output.LayerNorm", HIDDEN)
        linear(f"{layer}.intermediate_query.dense", FFN, HIDDEN)
        linear(f"{layer}.output_query.dense", HIDDEN, FFN)
        norm(f"{layer}.output_query.LayerNorm", HIDDEN)
    linear(f"speech_{llm}_proj", LLM_WIDTH, HIDDEN)
    outputs = {"q_proj": LLM_WIDTH, "k_proj": LLM_WIDTH // 2, "v_proj": LLM_WIDTH // 2}
    for n in range(2):
        for target in targets:
            lora = f"{llm}_model.base_model.model.model.layers.{n}.self_attn.{target}.lora"
            shapes[f"{lora}_A.default.weight"] = (rank, LLM_WIDTH)
            shapes[f"{lora}_B.default.weight"] = (outputs[target], rank)
    return {key: torch.randn(shape, generator=generator) * 0.3 for key, shape in shapes.items()}


def save(tensors, path, settings=SETTINGS, **entries):
    torch.save({"model": tensors, "config": {"model": settings}, "epoch": 3} | entries, path)
    return path


def convert(parts, source, out, llm="llama", beats=True, **kwargs):
    kwargs = {"qformer_heads": HEADS} | kwargs
    beats = parts / "beats.pt" if beats else None
    return convert_salmonn(source, out, whisper=str(parts / "whisper"), llm=str(parts / llm), beats=beats, **kwargs)


@pytest.mark.parametrize(
    ("llm", "kwargs"),
    [
        ("llama", {}),
        ("gemma", {"queries": 1, "layers": 1, "rank": 2, "targets": ("q_proj", "k_proj", "v_proj")}),
        ("llama", {"sound": False, "layers": 2}),
        ("llama", {"targets": ()}),
    ],
)
def test_round_trip_is_bit_equal(parts, tmp_path, llm, kwargs):
    """Converted, loaded, saved, loaded and exported: the original's tensors again, and a model of their sizes."""
    tensors = original(llm, **kwargs)
    sound = kwargs.get("sound", True)
    source = save(tensors, tmp_path / "original.pth")
    convert(parts, source, tmp_path / "converted", {"llama": "llama", "gemma": "gemma2"}[llm], beats=sound)

    model = AutoModel.from_pretrained(tmp_path / "converted")
    config, projector = model.config, model.config.projector_config
    assert projector.queries_per_window == kwargs.get("queries", 2) and (config.sound_config is not None) == sound
    assert (projector.window_frames, projector.window_stride) == (12, 5)  # 0.25 s and 0.1 s at 50 frames a second
    assert projector.qformer_config.num_hidden_layers == kwargs.get("layers", 3)
    targets = sorted(kwargs.get("targets", ("q_proj", "v_proj")))
    lora = {"r": kwargs.get("rank", 4), "lora_alpha": 16, "lora_dropout": 0.1, "target_modules": targets}
    assert config.lora == (lora if targets else None)
    assert set(config.base_parts) == {"audio_tower", "language_model"}

    inputs = AutoFeatureExtractor.from_pretrained(tmp_path / "converted")(
        [noise(0.05), noise(2.0)], return_tensors="pt"
    )
    windows = (1500 - 12) // 5 + 1
    audio_tokens = 2 * windows * projector.queries_per_window
    assert len(model.get_audio_features(**inputs).pooler_output) == audio_tokens

    model.save_pretrained(tmp_path / "again")
    AutoModel.from_pretrained(tmp_path / "again").save_pretrained(tmp_path / "and_again")
    assert not any("mlp" in key for key in load_file(tmp_path / "and_again" / "model.safetensors"))  # no base parts
    report = export_salmonn(tmp_path / "and_again", tmp_path / "exported.pth")
    assert ("sound_tower" in report) == sound
    exported = torch.load(tmp_path / "exported.pth", weights_only=True)["model"]
    assert set(exported) == set(tensors)
    for key, tensor in tensors.items():
        assert exported[key].dtype == tensor.dtype and torch.equal(exported[key], tensor), key


def test_an_exported_checkpoint_converts_to_the_same(parts, tmp_path):
    """Also what tensors do not tell: heads, windows, LoRA scale."""
    convert(parts, save(original(), tmp_path / "a.pth"), tmp_path / "a")
    export_salmonn(tmp_path / "a", tmp_path / "b.pth")
    convert(parts, tmp_path / "b.pth", tmp_path / "b", qformer_heads=None)
    assert (tmp_path / "a/config.json").read_text() == (tmp_path / "b/config.json").read_text()
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


def test_an_assumed_number_of_heads_is_reported(parts, tmp_path):
    source = save(original(), tmp_path / "a.pth")
    assert "ASSUMED" not in convert(parts, source, tmp_path / "told")
    assert "ASSUMED: 4 attention heads" in convert(parts, source, tmp_path / "assumed", qformer_heads=None)
    assert AutoConfig.from_pretrained(tmp_path / "assumed").projector_config.qformer_config.num_attention_heads == 4


def test_lora_is_scaled_by_alpha_over_r(parts, tmp_path):
    tensors = original()
    convert(parts, save(tensors, tmp_path / "a.pth"), tmp_path / "a")
    reference = AutoModelForCausalLM.from_pretrained(parts / "llama").eval()
    with torch.no_grad():
        for n, layer in enumerate(reference.model.layers):
            for target in ("q_proj", "v_proj"):
                lora = f"llama_model.base_model.model.model.layers.{n}.self_attn.{target}.lora"
                a, b = tensors[f"{lora}_A.default.weight"], tensors[f"{lora}_B.default.weight"]
                getattr(layer.self_attn, target).weight += 16 / 4 * b @ a
        input_ids = torch.randint(4, 290, (1, 7))
        logits = AutoModel.from_pretrained(tmp_path / "a")(input_ids=input_ids).logits
        torch.testing.assert_close(logits, reference(input_ids=input_ids).logits, atol=1e-4, rtol=1e-4)


def test_what_is_left_out_is_reported(parts, tmp_path):
    """Side effects of the original's saving rule are checked against the parts that they are copies of."""
    beats = torch.load(parts / "beats.pt", weights_only=True)["model"]
    embeddings = load_file(parts / "gemma2" / "model.safetensors")["model.embed_tokens.weight"]
    derived = {
        "speech_Qformer.bert.embeddings.position_ids": torch.arange(512)[None],
        "gemma_model.base_model.model.model.rotary_emb.inv_freq": torch.ones(4),
        f"beats.encoder.layers.1.{BIAS_TABLE}": beats[f"encoder.layers.0.{BIAS_TABLE}"],
        # with a row for a padding token, and in the 16 bits of the original's language model
        "gemma_model.base_model.model.lm_head.weight": torch.cat([embeddings, torch.ones(1, 32)]).half(),
        "speech_encoder.conv1.bias": load_file(parts / "whisper" / "model.safetensors")["model.encoder.conv1.bias"],
    }
    tensors = original("gemma")
    source = save(tensors | derived, tmp_path / "a.pth", optimizer={}, scaler={})
    report = convert(parts, source, tmp_path / "a", "gemma2")
    for key in derived:
        assert len(re.findall(f"left out.*{re.escape(key)}$", report, flags=re.MULTILINE)) == 1, key
    assert "epoch, optimizer, scaler" in report
    export_salmonn(tmp_path / "a", tmp_path / "b.pth")
    assert set(torch.load(tmp_path / "b.pth", weights_only=True)["model"]) == set(tensors)


def test_a_trained_whisper_is_kept(parts, tmp_path):
    bias = torch.randn(WHISPER_WIDTH)
    convert(parts, save(original() | {"speech_encoder.conv1.bias": bias}, tmp_path / "a.pth"), tmp_path / "a")
    model = AutoModel.from_pretrained(tmp_path / "a")
    assert set(model.config.base_parts) == {"language_model"}
    assert torch.equal(model.audio_tower.conv1.bias, bias)
    whisper = load_file(parts / "whisper" / "model.safetensors")
    assert torch.equal(model.audio_tower.conv2.weight, whisper["model.encoder.conv2.weight"])
    export_salmonn(tmp_path / "a", tmp_path / "b.pth")
    exported = torch.load(tmp_path / "b.pth", weights_only=True)["model"]
    assert torch.equal(exported["speech_encoder.conv1.bias"], bias)


def test_a_trained_beats_is_kept(parts, tmp_path):
    weight = torch.randn(BEATS_WIDTH)
    tensors = original() | {"beats.encoder.layers.1.final_layer_norm.weight": weight}
    assert "kept, trained" in convert(parts, save(tensors, tmp_path / "a.pth"), tmp_path / "a")
    model = AutoModel.from_pretrained(tmp_path / "a")
    assert torch.equal(model.sound_tower.layers[1].final_layer_norm.weight, weight)


def test_a_beats_with_a_classifier_serves_as_well(parts, tmp_path):
    torch.manual_seed(2)
    config = BeatsConfig.from_pretrained(parts / "beats", num_labels=3)
    beats = BeatsForAudioClassification(config)
    beats.save_pretrained(tmp_path / "beats")
    export_beats(tmp_path / "beats", tmp_path / "beats.pt")
    source, llama = save(original(), tmp_path / "a.pth"), str(parts / "llama")
    convert_salmonn(source, tmp_path / "a", str(parts / "whisper"), llama, tmp_path / "beats.pt", qformer_heads=HEADS)
    sound_tower = AutoModel.from_pretrained(tmp_path / "a").sound_tower
    assert type(sound_tower) is BeatsModel
    for key, tensor in beats.beats.state_dict().items():
        assert torch.equal(sound_tower.state_dict()[key], tensor), key


def test_language_models_come_as_pytorch_files_too(parts, tmp_path):
    """As Vicuna, the original's language model, does."""
    shutil.copytree(parts / "llama", tmp_path / "llama")
    whole = load_file(tmp_path / "llama" / "model.safetensors")
    (tmp_path / "llama" / "model.safetensors").unlink()
    torch.save(whole, tmp_path / "llama" / "pytorch_model.bin")
    source = save(original(), tmp_path / "a.pth")
    convert(parts, source, tmp_path / "a")
    convert(parts, source, tmp_path / "b", llm=tmp_path / "llama")
    ids = torch.randint(4, 290, (1, 5))
    logits = [AutoModel.from_pretrained(tmp_path / name)(input_ids=ids).logits for name in "ab"]
    assert torch.equal(*logits)


def test_processor_speaks_the_originals_prompt(parts, tmp_path):
    source = save(original(), tmp_path / "a.pth", SETTINGS | {"end_sym": "<|im_end|>"})
    convert(parts, source, tmp_path / "a", "with_tokenizer")
    processor, model = AutoProcessor.from_pretrained(tmp_path / "a"), AutoModel.from_pretrained(tmp_path / "a")
    turns = [{"role": "user", "content": [{"type": "audio"}, {"type": "text", "text": "What is it?"}]}]
    prompt = "<|im_start|>USER: <Speech><|audio|></Speech> What is it?\nASSISTANT:"
    assert processor.apply_chat_template(turns, add_generation_prompt=True) == prompt
    turns += [{"role": "assistant", "content": "A dog."}, {"role": "user", "content": "Where?"}]
    assert processor.apply_chat_template(turns) == f"{prompt}A dog.<|im_end|>USER: Where?\nASSISTANT:"
    assert model.config.audio_token_id == processor.audio_token_id == 3
    assert model.generation_config.eos_token_id == 2

    inputs = processor.apply_transcription_request([noise(0.4), noise(3.0)])
    windows = (1500 - 12) // 5 + 1
    assert (inputs["input_ids"] == 3).sum(-1).tolist() == [2 * windows] * 2
    assert (inputs["input_ids"][:, 0] == 1).all() and (inputs["input_ids"][:, 1] != 1).all()  # one bos
    together = model(**inputs).logits[:, -1]
    for row, clip in enumerate([noise(0.4), noise(3.0)]):
        alone = model(**processor.apply_transcription_request(clip)).logits[0, -1]
        torch.testing.assert_close(together[row], alone, atol=1e-4, rtol=1e-4)


def test_the_prompt_template_of_the_checkpoint_is_kept(parts, tmp_path):
    settings = SETTINGS | {"prompt_template": 'user "{}"\nmodel\n', "end_sym": "<|im_end|>"}
    convert(parts, save(original(), tmp_path / "a.pth", settings), tmp_path / "a", "with_tokenizer")
    text = AutoProcessor.from_pretrained(tmp_path / "a").apply_chat_template([{"role": "user", "content": "Hm?"}])
    assert text == '<|im_start|>user "Hm?"\nmodel\n'


def test_audio_token_can_be_chosen(parts, tmp_path):
    source = save(original(), tmp_path / "a.pth")
    assert "id 299" in convert(parts, source, tmp_path / "a")  # the last that is none of 1, 2 (bos, eos and pad)
    assert AutoModel.from_pretrained(tmp_path / "a").config.audio_token_id == 299
    convert(parts, source, tmp_path / "b", audio_token_id=7)
    assert AutoModel.from_pretrained(tmp_path / "b").config.audio_token_id == 7
    with pytest.raises(ValueError, match="no tokenizer to look '<x>' up in"):
        convert(parts, source, tmp_path / "c", audio_token="<x>")
    with pytest.raises(ValueError, match="no '<x>' as one special token"):
        convert(parts, source, tmp_path / "c", "with_tokenizer", audio_token="<x>")


@pytest.mark.parametrize(
    ("change", "kwargs", "message"),
    [
        (lambda t: t.pop("speech_query_tokens"), {}, "lacks the tensor speech_query_tokens"),
        (lambda t: t.pop("speech_llama_proj.weight"), {}, "lacks the tensor speech_llama_proj.weight"),
        (
            lambda t: t.pop("speech_Qformer.bert.encoder.layer.1.attention.self.key.bias"),
            {},
            r"missing tensors \['speech_Qformer.bert.encoder.layer.1.attention.self.key.bias'\]",
        ),
        (
            lambda t: t.pop("llama_model.base_model.model.model.layers.1.self_attn.v_proj.lora_B.default.weight"),
            {},
            r"missing tensors .*layers.1.self_attn.v_proj.lora_B.default.weight'\]",
        ),
        (
            lambda t: t.update({"speech_Qformer.cls.bias": torch.ones(1)}),
            {},
            r"left over \['speech_Qformer.cls.bias'\]",
        ),
        (
            lambda t: t.update({"speech_Qformer.bert.encoder.layer.2.output_query.dense.bias": torch.ones(3)}),
            {},
            r"layer.2.output_query.dense.bias has shape \(3,\), but its place in the model has \(40,\)",
        ),
        (
            lambda t: t.update({"ln_speech.weight": torch.ones(20), "ln_speech.bias": torch.ones(20)}),
            {},
            "ln_speech.weight is made for a width of 20, but Whisper's d_model is 16",
        ),
        (lambda t: t.update({"ln_audio.weight": torch.ones(9)}), {}, "ln_audio.*width of 9, but BEATs' width is 24"),
        (
            lambda t: t.update({"speech_llama_proj.weight": torch.ones(64, HIDDEN)}),
            {},
            "speech_llama_proj.*width of 64, but the language model's hidden size is 32",
        ),
        (lambda t: None, {"qformer_heads": 7}, "hidden_size 40 is not a multiple"),
        (lambda t: None, {"beats": False}, "name the BEATs .pt file"),
        (lambda t: (t.pop("ln_audio.weight"), t.pop("ln_audio.bias")), {}, "leave the BEATs file out"),
        (lambda t: None, {"llm": "whisper"}, "'whisper' model, not a causal one"),
        (lambda t: None, {"llm": "nowhere"}, "nowhere"),
        (
            lambda t: t.update({"llama_model.base_model.model.lm_head.weight": torch.ones(300, 32)}),
            {},
            "lm_head.weight is not .*llama's",
        ),
        (
            lambda t: t.update(
                {"beats.encoder.layers.1.self_attn.relative_attention_bias.weight": torch.ones(320, 2)}
            ),
            {},
            "relative_attention_bias.weight is not .*beats.pt's",
        ),
    ],
)
def test_what_does_not_fit_is_named(parts, tmp_path, change, kwargs, message):
    tensors = original()
    change(tensors)
    with pytest.raises((ValueError, OSError), match=message):
        convert(parts, save(tensors, tmp_path / "a.pth"), tmp_path / "out", **kwargs)
    assert [file.name for file in tmp_path.iterdir()] == ["a.pth"]  # nothing half-written


def test_a_language_model_is_no_whisper(parts, tmp_path):
    with pytest.raises(ValueError, match="'llama' model, not a Whisper"):
        convert_salmonn(
            save(original(), tmp_path / "a.pth"), tmp_path / "a", str(parts / "llama"), str(parts / "llama")
        )


def test_truncated_files_and_occupied_places_are_refused(parts, tmp_path):
    source = save(original(), tmp_path / "a.pth")
    (tmp_path / "cut.pth").write_bytes(source.read_bytes()[:-1000])
    with pytest.raises(OSError, match="cut.pth"):
        convert(parts, tmp_path / "cut.pth", tmp_path / "out")
    torch.save({"state_dict": {}}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="no entry 'model'"):
        convert(parts, tmp_path / "other.pth", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    convert(parts, source, tmp_path / "out")  # an empty directory is as good as none
    before = (tmp_path / "out" / "config.json").read_bytes()
    with pytest.raises(ValueError, match="not empty"):
        convert(parts, source, tmp_path / "out")
    assert (tmp_path / "out" / "config.json").read_bytes() == before
    with pytest.raises(ValueError, match="exists"):
        export_salmonn(tmp_path / "out", source)


def test_a_model_that_the_original_cannot_hold_is_refused(tiny_checkpoint, tmp_path):
    with pytest.raises(ValueError, match="no place for.*projector.window_positions"):
        export_salmonn(tiny_checkpoint, tmp_path / "a.pth")
    assert not any(tmp_path.iterdir())


def test_command_line(parts, tmp_path, capsys):
    source = save(original(), tmp_path / "a.pth")
    arguments = ["salmonn", source, tmp_path / "a", "--whisper", parts / "whisper", "--llm", parts / "llama"]
    arguments = [str(argument) for argument in [*arguments, "--qformer-heads", HEADS]]
    with pytest.raises(SystemExit, match="error: .*name the BEATs .pt file"):
        main(arguments)
    main([*arguments, "--beats", str(parts / "beats.pt")])
    assert "Q-Former: 3 layers, hidden size 40, 5 heads" in capsys.readouterr().out
    main(["export", str(tmp_path / "a"), str(tmp_path / "b.pth")])
    assert (tmp_path / "b.pth").is_file()
