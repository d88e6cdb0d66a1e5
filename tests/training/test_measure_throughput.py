"""The command that compares training with the reference way of working."""

import inspect
import re
import runpy
import sys

import pytest
import yaml
from test_training import ROOT, WHISPER_PROJECTOR, parts, stage1_recipe, whisper_with_tokens, write_parquet  # noqa: F401


@pytest.mark.parametrize("flag, expected", [((), False), (("--bf16", "true"), True)])
def test_precision_is_the_recipes_unless_given(flag, expected, tmp_path, monkeypatch):
    clips = write_parquet(tmp_path / "clips.parquet", 2)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"train_files": [clips], "bf16": False}))
    script, ran = runpy.run_path(str(ROOT / "training" / "benchmarks" / "measure_throughput.py")), []
    names = inspect.unwrap(script["main"]).__globals__
    monkeypatch.setitem(names, "clips_per_second", lambda recipe, _: ran.append(recipe) or 1.0)
    monkeypatch.setattr(sys, "argv", ["measure_throughput.py", str(tmp_path / "recipe.yaml"), *flag])
    script["main"]()
    assert [recipe["bf16"] for recipe in ran] == [expected] * 4


@pytest.mark.slow
def test_all_three_ways_of_a_projector_from_whispers_decoder(parts, tmp_path, monkeypatch, capsys):  # noqa: F811
    """The reference way has a Q-Former in its place, and no clip but those of the first file is read."""
    whisper = whisper_with_tokens(tmp_path / "whisper")
    other = write_parquet(tmp_path / "other.parquet", 3, text_column="words")  # which has no text: reading it fails
    recipe = stage1_recipe(parts, tmp_path / "out", audio_tower=str(whisper), projector_config=WHISPER_PROJECTOR)
    recipe |= {"speeds": [0.9], "speed_files": [other]}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    script = ROOT / "training" / "benchmarks" / "measure_throughput.py"
    monkeypatch.setattr(sys, "argv", [str(script), str(tmp_path / "recipe.yaml"), "--clips", "8", "--batch", "4"])
    runpy.run_path(str(script), run_name="__main__")
    rates = re.findall(r"([\d.]+) clips/s", capsys.readouterr().out)
    assert len(rates) == 3 and all(float(rate) > 0 for rate in rates)
