"""Recipes: YAML values, overrides, unknown keys."""

from dataclasses import dataclass, field

import pytest
from transformers import TrainingArguments

from salmonn_hf.recipe import parse_recipe


@dataclass
class Arguments:
    name: str = "x"
    files: list[str] = field(default_factory=list)


def write(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return str(path)


def test_recipe_and_overrides(tmp_path):
    recipe = write(
        tmp_path,
        "name: a\nfiles: [p, q]\nlearning_rate: 1.0e-3\nbf16: false\n"
        "lr_scheduler_kwargs: {num_cycles: 2}\nseed: null\n",
    )
    arguments, training = parse_recipe(
        (Arguments, TrainingArguments), [recipe, "--learning_rate", "0.5", "--output_dir=out"]
    )
    assert arguments == Arguments("a", ["p", "q"])
    assert (training.learning_rate, training.output_dir, training.seed, training.bf16) == (0.5, "out", 42, False)
    assert training.lr_scheduler_kwargs == {"num_cycles": 2}


def test_without_a_recipe():
    assert parse_recipe((Arguments,), ["--name", "b"])[0].name == "b"


@pytest.mark.parametrize("argv", [["--naem", "b"], None])
def test_an_unknown_key_is_refused_with_the_nearest(tmp_path, argv):
    with pytest.raises(ValueError, match="'naem'.*'name'"):
        parse_recipe((Arguments,), argv or [write(tmp_path, "naem: b\n")])
