"""The composite config: round trip, parts that do not fit, and what is no field of it."""

import json
import re
from pathlib import Path

import pytest
import torch
from conftest import LANGUAGE_MODELS, tiny_config, tiny_text_config
from transformers import AutoConfig, AutoModel

import salmonn_hf
from salmonn_hf import SalmonnConfig
from salmonn_hf.model.configuration_projector import ProjectorConfig
from salmonn_hf.model.configuration_whisper_projector import WhisperProjectorConfig
from salmonn_hf.model.configuration_window_qformer import WindowQFormerConfig
from salmonn_hf.model.whisper_projector import WhisperProjector
from salmonn_hf.model.window_qformer import WindowQFormerProjector

PACKAGE = Path(salmonn_hf.__file__).parent
WHISPER = {"num_layers": 1, "window_reach": 2, "merged_windows": 3}
PROJECTORS = {WindowQFormerConfig: WindowQFormerProjector, WhisperProjectorConfig: WhisperProjector}


@pytest.mark.parametrize("projector", [{"frame_mlp_size": 8}, WHISPER], ids=["window Q-Former", "Whisper"])
@pytest.mark.parametrize("model_type", LANGUAGE_MODELS)
def test_saved_and_loaded_is_the_same(tmp_path, model_type, projector):
    config = tiny_config(model_type, **projector, lora={"r": 4}, base_parts={"audio_tower": "openai/whisper-tiny"})
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is SalmonnConfig and type(loaded.projector_config) is type(config.projector_config)
    assert loaded.text_config.model_type == model_type
    assert loaded.to_diff_dict() | {"_name_or_path": ""} == config.to_diff_dict() | {"_name_or_path": ""}


def test_default_is_a_working_config():
    """SALMONN's window Q-Former, fitted to the parts that it joins."""
    config = SalmonnConfig()
    assert type(config.projector_config) is WindowQFormerConfig and config.projector_config.window_frames == 17
    assert config.projector_config.qformer_config.encoder_hidden_size == config.audio_config.d_model
    assert config.projector_config.output_size == config.text_config.hidden_size


def test_sizes_of_whispers_decoder_are_filled_in():
    config = tiny_config(num_layers=1)
    audio, projector = config.audio_config, config.projector_config
    assert (projector.num_attention_heads, projector.ffn_dim, projector.vocab_size) == (2, 32, 100)
    assert projector.activation_function == audio.activation_function
    smaller = tiny_config(num_layers=1, vocab_size=50)  # as behind `drop_unused_tokens`
    assert smaller.projector_config.vocab_size == 50


def own_fields(config_class):
    return {name for name in config_class.__annotations__ if not name.startswith("_")}


def test_few_fields_and_no_training_setting():
    fields = own_fields(SalmonnConfig)
    assert {"projector_config", "audio_config", "text_config"} <= fields and len(fields) <= 14
    for config_class in (SalmonnConfig, ProjectorConfig, *PROJECTORS):
        assert not [name for name in own_fields(config_class) if re.search("loss|weight|rate|seed|noise|decay", name)]
    # And nothing of a projector is a field of the whole, nor of one alone a field of all.
    window_qformer, whisper = (own_fields(config_class) for config_class in PROJECTORS)
    assert not fields & (own_fields(ProjectorConfig) | window_qformer | whisper)
    assert not window_qformer & whisper


def test_no_other_file_asks_which_projector_it_is():
    """The names of a projector's type, class and config stand in its own files, and where both are registered."""
    names = {n for c, m in PROJECTORS.items() for n in (c.model_type, c.__name__, m.__name__)}
    named = re.compile("|".join(names))
    # What these files are for: the projectors themselves, and checkpoints of another layout.
    own = {f"model/{name}.py" for name in (
        "configuration_window_qformer", "window_qformer", "configuration_whisper_projector", "whisper_projector",
        "whisper_token_head", "sound_summary",
    )}  # fmt: skip
    registered = {"model/configuration_salmonn.py", "model/modeling_salmonn.py"}
    found = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        path = file.relative_to(PACKAGE).as_posix()
        lines = [line for line in file.read_text().splitlines() if named.search(line)]
        if lines and path not in own and not path.startswith("convert/"):
            found[path] = lines
    assert found.keys() == registered  # which also shows that names are found at all
    for line in sum(found.values(), []):
        assert not re.search(r"\b(if|elif|isinstance|==|match)\b", line), line


def test_a_projector_of_other_parts_is_refused():
    """As when a config's encoder or language model was changed, and its projector was not."""
    projector_config = tiny_config(num_layers=1).projector_config.to_dict()
    for change, message in (
        ({"text_config": tiny_text_config(hidden_size=64)}, "output_size is 32.*have 64"),
        ({"sound_layers": [1]}, "sound_hidden_size is 0.*have 16"),
    ):
        with pytest.raises(ValueError, match=message):
            SalmonnConfig(
                **{"audio_config": tiny_config().audio_config, "text_config": tiny_text_config(), "audio_token_id": 3}
                | {"projector_config": projector_config}
                | change
            )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qformer_config": {"encoder_hidden_size": 112}}, "112.*16 features"),
        ({"audio_token_id": 300}, "300 tokens"),
        ({"window_stride": 9}, "stride"),
        ({"queries_per_window": 0}, "at least 1"),
        ({"frame_mlp_size": 8, "window_stride": 7}, "7 frames do not fall into 2 equal shares"),
        ({"audio_config": tiny_text_config()}, "must be a Whisper"),
    ],
)
def test_parts_that_do_not_fit_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"merged_windows": 3}, "WindowQFormerConfig has no field 'merged_windows'.*It has: .*window_frames"),
        ({"window_frmes": 3}, "no field 'window_frmes'; the nearest is 'window_frames'"),
        ({"num_layers": 1, "output_norm": True}, "WhisperProjectorConfig has no field 'output_norm'"),
        ({"num_layers": 1, "hidden_size": 64}, "no field 'hidden_size'"),
    ],
)
def test_a_field_that_a_projector_does_not_have_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**change)


@pytest.mark.parametrize("projector", [{"frame_mlp_size": 8}, WHISPER], ids=["window Q-Former", "Whisper"])
def test_what_transformers_writes_into_a_projectors_config_is_taken(projector, tmp_path):
    """As a part of the whole and saved alone, with settings of the loading, from files of other versions too."""
    config = tiny_config(**projector, dtype="bfloat16")
    config._attn_implementation = "eager"
    AutoModel.from_config(config.projector_config).save_pretrained(tmp_path / "alone")
    alone = AutoConfig.from_pretrained(tmp_path / "alone", attn_implementation="eager", num_labels=3)
    assert type(alone) is type(config.projector_config) and alone._attn_implementation == "eager"
    assert alone.architectures == [PROJECTORS[type(alone)].__name__]
    config.projector_config._is_quantized = True  # as behind a quantiser
    config.save_pretrained(tmp_path / "whole")
    file = tmp_path / "whole" / "config.json"
    written = json.loads(file.read_text())
    del written["projector_config"]["dtype"]
    written["projector_config"] |= {
        "torch_dtype": "bfloat16", "auto_map": {}, "_commit_hash": "0" * 40, "quantization_config": {"parts": {}},
        "name_or_path": "somewhere", "return_dict": True, "experts_implementation": None,
    }  # fmt: skip
    file.write_text(json.dumps(written))
    projector_config = AutoConfig.from_pretrained(tmp_path / "whole").projector_config
    assert projector_config.dtype == torch.bfloat16 and projector_config.name_or_path == "somewhere"


def test_its_vocabulary_is_the_language_models(tmp_path):
    config = tiny_config()
    config.vocab_size += 20
    assert config.text_config.vocab_size == config.vocab_size == 320
    config.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).vocab_size == 320
    assert "vocab_size" not in json.loads((tmp_path / "config.json").read_text())
