"""Recipes: YAML values, overrides, unknown keys."""

import runpy
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from transformers import TrainingArguments

from salmonn_hf.data.arguments import DataArguments
from salmonn_hf.data.augmentation import Augmentation
from salmonn_hf.training.arguments import SalmonnTrainingArguments
from salmonn_hf.training.recipe import parse_recipe

ROOT = Path(__file__).resolve().parents[2]


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


@pytest.mark.parametrize(
    "recipe, message",
    [
        ("seed: 1\nseed: 2\n", "seed twice"),
        ("max_steps: 5\nnum_train_epochs: 2\n", "max_steps and num_train_epochs contradict"),
        ("bf16: true\nfp16: true\n", "bf16 and fp16 contradict"),
        ("- a\n", "not a recipe, a YAML mapping"),
    ],
)
def test_contradictions_are_refused(tmp_path, recipe, message):
    with pytest.raises(ValueError, match=message):
        parse_recipe((Arguments, TrainingArguments), [write(tmp_path, recipe)])


def test_the_command_line_overrides_what_contradicts_it(tmp_path):
    recipe = write(tmp_path, "num_train_epochs: 2\nmax_steps: null\nfp16: false\nbf16: true\n")
    _, training = parse_recipe((Arguments, SalmonnTrainingArguments), [recipe, "--max_steps", "5"])
    assert (training.max_steps, training.num_train_epochs, training.bf16) == (5, 3.0, True)


def test_the_short_form_and_sources_stand_together(tmp_path):
    recipe = write(tmp_path, "train_files: [a.parquet]\nsources:\n  - {path: b.parquet}\n")
    kinds = (DataArguments, SalmonnTrainingArguments)
    data, _ = parse_recipe(kinds, [recipe, "--output_dir", str(tmp_path)])
    assert [source.path for source in data.training_sources()] == ["a.parquet", "b.parquet"]


@pytest.mark.parametrize(
    "path", sorted((ROOT / "training" / "recipes").glob("*/*.yaml")), ids=lambda p: "/".join(p.parts[-2:])
)
def test_recipes_of_the_repository_are_valid(path, tmp_path):
    if path.stem.startswith("quantize"):
        arguments = runpy.run_path(str(ROOT / "training" / "quantize.py"))["QuantizeArguments"]
        assert parse_recipe((arguments,), [str(path), "--output_dir", str(tmp_path)])[0].train_files
        return
    script = "run_stage2" if path.stem == "finetune" else f"run_{path.stem.split('_')[0]}"
    model_arguments = runpy.run_path(str(ROOT / "training" / f"{script}.py"))["ModelArguments"]
    given = ["--output_dir", str(tmp_path)]
    if path.stem == "finetune":
        given += ["--train_files", "a.parquet", "--eval_file", "b.parquet"]
    kinds = (model_arguments, DataArguments, Augmentation, SalmonnTrainingArguments)
    _, data, _, _ = parse_recipe(kinds, [str(path), *given])
    assert data.training_sources()


def test_recipes_and_scripts_name_no_file_outside_the_repository():
    for path in sorted((ROOT / "training").rglob("*")):
        if path.suffix in (".py", ".yaml"):
            assert "../shared" not in path.read_text(encoding="utf-8"), path
