"""Full size, on the meta device: sizes against the published ones, and every tensor of the original checkpoints."""

from functools import cache

import pytest
import torch
from conftest import golden_path
from transformers import WhisperForConditionalGeneration
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from salmonn_hf import SalmonnForConditionalGeneration
from salmonn_hf.convert import beats as convert_beats
from salmonn_hf.convert.published_configs import PUBLISHED_SYSTEMS, published_config
from salmonn_hf.convert.salmonn import DERIVED, from_original_key
from salmonn_hf.model.windows import num_windows

SYSTEMS = tuple(PUBLISHED_SYSTEMS)

# Totals as the models' own safetensors metadata state them on https://huggingface.co, tied embeddings counted once.
LANGUAGE_MODEL_PARAMETERS = {
    "salmonn-7b": 6_738_415_616,  # lmsys/vicuna-7b-v1.5, a Llama-2-7B
    "nota": 3_212_749_824,  # meta-llama/Llama-3.2-3B-Instruct
    "seed": 2_614_341_888,  # google/gemma-2-2b-it
    "nlp-07": 494_032_768,  # Qwen/Qwen2.5-0.5B-Instruct
}
WHISPER_PARAMETERS = {
    "salmonn-7b": 1_543_304_960,  # openai/whisper-large-v2, encoder and decoder
    "nota": 1_543_304_960,
    "seed": 808_878_080,  # openai/whisper-large-v3-turbo
    "nlp-07": 808_878_080,
}
BEATS_PARAMETERS = (
    90_311_792  # BEATs iter3+, without classifier (https://github.com/microsoft/unilm/tree/master/beats)
)


@cache
def meta_model(name):
    with torch.device("meta"):
        return SalmonnForConditionalGeneration(published_config(name))


def count(module, keep=lambda name: True):
    return sum(parameter.numel() for name, parameter in module.named_parameters() if keep(name))


def is_lora(name):
    return ".lora_" in name


@pytest.mark.parametrize("name", SYSTEMS)
def test_language_model_has_its_published_parameters(name):
    assert count(meta_model(name).language_model, lambda name: not is_lora(name)) == LANGUAGE_MODEL_PARAMETERS[name]


@pytest.mark.parametrize("name", SYSTEMS)
def test_whisper_has_its_published_parameters(name):
    with torch.device("meta"):
        whisper = WhisperForConditionalGeneration(published_config(name).audio_config)
    assert count(whisper) == WHISPER_PARAMETERS[name]
    assert count(meta_model(name).audio_tower) == count(whisper.model.encoder)

    # Radford et al., 2022, table 1 and section 2.2: 32 layers of width 1280; keys have no bias.
    width, inner, mels = 1280, 4 * 1280, 80 if name in ("salmonn-7b", "nota") else 128
    convolutions = (3 * mels * width + width) + (3 * width * width + width)
    attention = 4 * width * width + 3 * width
    feed_forward = 2 * width * inner + inner + width
    layers = 32 * (attention + feed_forward + 2 * 2 * width)
    assert count(meta_model(name).audio_tower) == convolutions + 1500 * width + layers + 2 * width


@pytest.mark.parametrize("name", SYSTEMS)
def test_beats_has_its_published_parameters(name):
    assert count(meta_model(name).sound_tower) == BEATS_PARAMETERS


@pytest.mark.parametrize(
    ("name", "hidden", "query_rows", "value_rows", "layers", "lora"),
    [
        # The LoRA counts are also those that PEFT users print for r 8 on q_proj and v_proj of these models.
        ("salmonn-7b", 4096, 32 * 128, 32 * 128, 32, 4_194_304),
        ("nota", 3072, 24 * 128, 8 * 128, 28, 2_293_760),
        ("seed", 2304, 8 * 256, 4 * 256, 26, 1_597_440),
        ("nlp-07", 896, 14 * 64, 2 * 64, 24, 540_672),
    ],
)
def test_trained_parts_have_the_parameters_of_the_formula(name, hidden, query_rows, value_rows, layers, lora):
    model = meta_model(name)
    # BERT base, two layers, keys and values of the cross-attention from 1280 + 768 features.
    h, inner, features = 768, 3072, 1280 + 768
    own = 4 * (h * h + h)
    cross = 2 * (h * h + h) + 2 * (features * h + h)
    feed_forward = (h * inner + inner) + (inner * h + h)
    qformer = h + 2 * h + 2 * (own + cross + feed_forward + 3 * 2 * h)  # query, its LayerNorm, layers
    assert qformer == 22_838_016  # "22.8 M"
    norms = count(model.projector.audio_norm) + count(model.projector.sound_norm)
    assert count(model.projector) - norms == qformer + h * hidden + hidden
    assert norms == 2 * 1280 + 2 * 768

    rank = 8
    assert lora == layers * rank * ((hidden + query_rows) + (hidden + value_rows))
    assert count(model.language_model, is_lora) == lora


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("salmonn-7b", {"rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "tie_word_embeddings": False}),
        ("nota", {"rms_norm_eps": 1e-5, "max_position_embeddings": 131072, "tie_word_embeddings": True}),
        (
            "seed",
            {
                "rms_norm_eps": 1e-6,
                "query_pre_attn_scalar": 256,
                "attn_logit_softcapping": 50.0,
                "final_logit_softcapping": 30.0,
                "sliding_window": 4096,
                "layer_types": ["sliding_attention", "full_attention"] * 13,
                "tie_word_embeddings": True,
            },
        ),
        (
            "nlp-07",
            {
                "rms_norm_eps": 1e-6,
                "sliding_window": None,
                "layer_types": ["full_attention"] * 24,
                "tie_word_embeddings": True,
            },
        ),
    ],
)
def test_settings_that_no_shape_shows(name, settings):
    model = meta_model(name)
    assert {key: getattr(model.language_model.config, key) for key in settings} == settings
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == settings["tie_word_embeddings"]


@pytest.mark.parametrize(
    ("name", "head_dim", "theta", "slowest_divided_by"),
    [
        ("salmonn-7b", 128, 1e4, 1),
        ("nota", 128, 5e5, 32),  # Llama 3.2 stretches its slow rotations 32 times and leaves the fast ones
        ("seed", 256, 1e4, 1),
        ("nlp-07", 64, 1e6, 1),
    ],
)
def test_rotations(name, head_dim, theta, slowest_divided_by):
    config = published_config(name).text_config
    frequencies = LlamaRotaryEmbedding(config).inv_freq
    assert len(frequencies) == head_dim // 2
    assert frequencies[0] == 1.0
    assert float(frequencies[1]) == pytest.approx(theta ** (-2 / head_dim), rel=1e-5)
    assert float(frequencies[-1]) == pytest.approx(
        theta ** (-(head_dim - 2) / head_dim) / slowest_divided_by, rel=1e-5
    )


@pytest.mark.parametrize("name", SYSTEMS)
def test_thirty_seconds_are_88_audio_tokens(name):
    model = meta_model(name)
    assert model.config.audio_config.max_source_positions == 1500
    projector = model.config.projector_config
    assert num_windows(1500, projector.window_frames, projector.window_stride, not projector.pad_to_30_seconds) == 88


def test_configs_do_not_share_what_they_hold():
    changed = published_config("nota", projector_config={"pad_to_30_seconds": False})
    assert changed.projector_config.pad_to_30_seconds is False
    changed.text_config.rope_parameters["factor"] = 1.0
    changed.lora["r"] = 1
    fresh = published_config("nota")
    assert fresh.text_config.rope_parameters["factor"] == 32.0
    assert (fresh.lora["r"], fresh.projector_config.pad_to_30_seconds) == (8, True)


def test_unknown_name():
    with pytest.raises(ValueError, match="no published system 'salmon'; choose one of salmonn-7b, nota, seed, nlp-07"):
        published_config("salmon")


def linear(key, rows, columns):
    return {f"{key}.weight": (rows, columns), f"{key}.bias": (rows,)}


def layer_norm(key, width):
    return {f"{key}.weight": (width,), f"{key}.bias": (width,)}


def original_checkpoint(
    language_model,
    layers,
    hidden,
    query_rows,
    value_rows,
    tied_rows=None,
    rotary=None,
    speech=1280,
    sound=768,
    sound_layers=12,
    sound_heads=12,
    h=768,
    inner=3072,
):
    """
    Every tensor of an original checkpoint: (trained, carried along though frozen, derived buffers), name to shape.
    Written down from the original's code: it saves whatever is not a frozen parameter.
    """
    decoder = f"{language_model}_model.base_model.model"
    trained = {"speech_query_tokens": (1, 1, h)}
    carried, derived = {}, {"speech_Qformer.bert.embeddings.position_ids": (1, 512)}
    for layer in range(layers):
        attention = f"{decoder}.model.layers.{layer}.self_attn"
        for projection, rows in (("q_proj", query_rows), ("v_proj", value_rows)):
            trained[f"{attention}.{projection}.lora_A.default.weight"] = (8, hidden)
            trained[f"{attention}.{projection}.lora_B.default.weight"] = (rows, 8)
        if rotary:
            derived[f"{attention}.rotary_emb.inv_freq"] = (rotary,)
    if tied_rows:
        carried[f"{decoder}.lm_head.weight"] = (tied_rows, hidden)
    for layer in range(1, sound_layers):
        carried[f"beats.encoder.layers.{layer}.self_attn.relative_attention_bias.weight"] = (320, sound_heads)

    trained |= layer_norm("ln_speech", speech) | layer_norm("ln_audio", sound)
    trained |= layer_norm("speech_Qformer.bert.embeddings.LayerNorm", h)
    for layer in range(2):
        prefix = f"speech_Qformer.bert.encoder.layer.{layer}"
        for attention, width in (("attention", h), ("crossattention", speech + sound)):
            trained |= linear(f"{prefix}.{attention}.self.query", h, h)
            trained |= linear(f"{prefix}.{attention}.self.key", h, width)
            trained |= linear(f"{prefix}.{attention}.self.value", h, width)
            trained |= linear(f"{prefix}.{attention}.output.dense", h, h)
            trained |= layer_norm(f"{prefix}.{attention}.output.LayerNorm", h)
        trained |= linear(f"{prefix}.intermediate_query.dense", inner, h)
        trained |= linear(f"{prefix}.output_query.dense", h, inner)
        trained |= layer_norm(f"{prefix}.output_query.LayerNorm", h)
    trained |= linear(f"speech_{language_model}_proj", hidden, h)
    return trained, carried, derived


ORIGINAL_SIZES = {
    # transformers 4.28, which SALMONN pins, still saved the rotary frequencies.
    "salmonn-7b": {
        "language_model": "llama",
        "layers": 32,
        "hidden": 4096,
        "query_rows": 4096,
        "value_rows": 4096,
        "rotary": 64,
    },
    # The trainers add a padding token, so that the tied output matrix has one row more than the published one.
    "nota": {
        "language_model": "llama",
        "layers": 28,
        "hidden": 3072,
        "query_rows": 3072,
        "value_rows": 1024,
        "tied_rows": 128257,
    },
    "seed": {
        "language_model": "gemma",
        "layers": 26,
        "hidden": 2304,
        "query_rows": 2048,
        "value_rows": 1024,
        "tied_rows": 256001,
    },
    # Had it been trained with BEATs, see `published_config`.
    "nlp-07": {
        "language_model": "llama",
        "layers": 24,
        "hidden": 896,
        "query_rows": 896,
        "value_rows": 128,
        "tied_rows": 151666,
    },
}
TINY_SIZES = {"layers": 2, "hidden": 64, "query_rows": 64, "value_rows": 32, "speech": 64, "sound": 48} | {
    "sound_layers": 3,
    "sound_heads": 4,
    "h": 96,
    "inner": 192,
}


def golden(file):
    return torch.load(golden_path(file), weights_only=True, map_location="cpu")


@pytest.mark.parametrize(("file", "language_model"), [("llama", "llama"), ("gemma2", "gemma")])
def test_the_list_of_original_tensors_is_that_of_real_checkpoints(file, language_model):
    tied_rows = 300 if language_model == "gemma" else None
    trained, carried, derived = original_checkpoint(language_model, tied_rows=tied_rows, **TINY_SIZES)
    tensors = golden(f"salmonn_tiny_{file}.pth")["model"]
    assert {key: tuple(tensor.shape) for key, tensor in tensors.items()} == trained | carried | derived


@pytest.mark.parametrize("name", SYSTEMS)
def test_every_original_tensor_has_its_place(name):
    trained, carried, derived = original_checkpoint(**ORIGINAL_SIZES[name])
    model = meta_model(name)
    ours = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    frozen = ("audio_tower.", "sound_tower.", "language_model.")
    ours_trained = {key: shape for key, shape in ours.items() if is_lora(key) or not key.startswith(frozen)}
    assert {from_original_key(key): shape for key, shape in trained.items()} == ours_trained
    # What the original carries along belongs to frozen parts, which come from files of their own.
    assert {from_original_key(key).split(".")[0] for key in carried} <= {"sound_tower", "language_model"}
    assert all(DERIVED.search(key) for key in derived)
    assert not any(DERIVED.search(key) for key in trained | carried)


def original_beats(layers=12, width=768, heads=12, inner=3072, embed=512, classes=None):
    """Every tensor of an original BEATs checkpoint: (the model's, repeated ones, the classifier's), name to shape."""
    tensors = {"patch_embedding.weight": (embed, 1, 16, 16)} | layer_norm("layer_norm", embed)
    tensors |= linear("post_extract_proj", width, embed) | layer_norm("encoder.layer_norm", width)
    tensors |= {"encoder.pos_conv.0.bias": (width,), "encoder.pos_conv.0.weight_g": (1, 1, 128)}
    tensors["encoder.pos_conv.0.weight_v"] = (width, width // 16, 128)
    table = "encoder.layers.{}.self_attn.relative_attention_bias.weight"
    tensors[table.format(0)] = (320, heads)
    for layer in range(layers):
        prefix = f"encoder.layers.{layer}"
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
            tensors |= linear(f"{prefix}.self_attn.{projection}", width, width)
        tensors |= linear(f"{prefix}.self_attn.grep_linear", 8, width // heads)
        tensors[f"{prefix}.self_attn.grep_a"] = (1, heads, 1, 1)
        tensors |= linear(f"{prefix}.fc1", inner, width) | linear(f"{prefix}.fc2", width, inner)
        tensors |= layer_norm(f"{prefix}.self_attn_layer_norm", width) | layer_norm(
            f"{prefix}.final_layer_norm", width
        )
    repeated = {table.format(layer): (320, heads) for layer in range(1, layers)}
    return tensors, repeated, linear("predictor", classes, width) if classes else {}


@pytest.mark.parametrize(("file", "classes"), [("beats_tiny.pt", None), ("beats_tiny_finetuned.pt", 11)])
def test_the_list_of_beats_tensors_is_that_of_real_checkpoints(file, classes):
    tensors, repeated, classifier = original_beats(3, 48, 4, 128, 32, classes)
    real = {key: tuple(tensor.shape) for key, tensor in golden(file)["model"].items()}
    assert real == tensors | repeated | classifier


def test_every_beats_tensor_has_its_place():
    tensors, repeated, classifier = original_beats(classes=527)
    ours = {key: tuple(tensor.shape) for key, tensor in meta_model("seed").sound_tower.state_dict().items()}
    assert {convert_beats.from_original_key(key): shape for key, shape in tensors.items()} == ours
    assert sum(torch.Size(shape).numel() for shape in tensors.values()) == BEATS_PARAMETERS
    assert all(convert_beats.SHARED_BIAS.fullmatch(key) for key in repeated)
    assert {convert_beats.from_original_key(key) for key in classifier} == {"classifier.weight", "classifier.bias"}


def test_beats_is_the_published_iter3_plus():
    # The entry `cfg` of BEATs_iter3_plus_AS2M.pt.
    cfg = {
        "encoder_layers": 12,
        "encoder_embed_dim": 768,
        "encoder_ffn_embed_dim": 3072,
        "encoder_attention_heads": 12,
        "activation_fn": "gelu",
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "activation_dropout": 0.0,
        "encoder_layerdrop": 0.0,
        "dropout_input": 0.0,
        "layer_norm_first": False,
        "conv_bias": False,
        "conv_pos": 128,
        "conv_pos_groups": 16,
        "relative_position_embedding": True,
        "num_buckets": 320,
        "max_distance": 800,
        "gru_rel_pos": True,
        "deep_norm": True,
        "input_patch_size": 16,
        "embed_dim": 512,
        "finetuned_model": False,
    }
    published = convert_beats.config_from_original(cfg)
    config = published_config("seed").sound_config
    names = [convert_beats.SETTINGS[key][0] for key in cfg if key in convert_beats.SETTINGS]
    assert len(names) == len(cfg) - 1
    assert {name: getattr(config, name) for name in names} == {name: getattr(published, name) for name in names}
