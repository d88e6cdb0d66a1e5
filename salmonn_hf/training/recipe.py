"""YAML recipes with command-line overrides: `run_stage1.py RECIPE.yaml --learning_rate 1e-4`."""

import difflib
import json
import sys

import torch
import yaml
from transformers import HfArgumentParser

# Keys of which one makes the other void; on the command line, one may override the other of the recipe.
CONTRADICTIONS = (("max_steps", "num_train_epochs"), ("bf16", "fp16"))


class _RecipeLoader(yaml.SafeLoader):
    """YAML in which a key that comes twice is an error: the first would silently be lost."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if repeated := sorted({str(key) for key in keys if keys.count(key) > 1}):
            raise ValueError(f"The recipe has {', '.join(repeated)} twice{node.start_mark}; keep one of them.")
        return super().construct_mapping(node, deep)


def parse_recipe(dataclass_types, argv: list[str] | None = None):
    """
    Dataclass instances from a recipe, its path the first argument, and `--key value` overrides after it.

    Raises:
        ValueError: for a key that no dataclass has, with the nearest one; for a key that is there twice; for two that
            contradict each other. What the dataclasses refuse themselves is raised as they do.
    """
    argv = sys.argv[1:] if argv is None else argv
    recipe, overrides = {}, argv
    if argv and not argv[0].startswith("-"):
        with open(argv[0]) as file:
            recipe = yaml.load(file, _RecipeLoader) or {}
        overrides = argv[1:]
        if not isinstance(recipe, dict):
            raise ValueError(
                f"{argv[0]} is not a recipe, a YAML mapping of keys to values, but a {type(recipe).__name__}."
            )
    parser = HfArgumentParser(dataclass_types, allow_abbrev=False)
    known = {action.dest for action in parser._actions}
    overridden = [a.removeprefix("--").split("=")[0] for a in overrides if a.startswith("--")]
    for key in [*recipe, *overridden]:
        if key not in known and key != "help":
            nearest = difflib.get_close_matches(str(key), known, n=1)
            raise ValueError(f"Unknown recipe key {key!r}." + (f" Did you mean {nearest[0]!r}?" if nearest else ""))
    recipe = {key: value for key, value in recipe.items() if value is not None}
    for first, second in CONTRADICTIONS:
        for given in ({key for key, value in recipe.items() if value not in (False, [])}, set(overridden)):
            if {first, second} <= given:
                raise ValueError(f"{first} and {second} contradict each other; keep one of them.")
        for one, other in ((first, second), (second, first)):
            if one in overridden and other in recipe:
                del recipe[other]
    arguments = []
    for key, value in recipe.items():
        values = value if isinstance(value, list) else [value]
        arguments += [f"--{key}", *(json.dumps(v) if isinstance(v, dict) else str(v) for v in values)]
    if "use_cpu" in known and not torch.accelerator.is_available():
        arguments += ["--use_cpu", "true"]  # Trainer refuses bf16 on a machine without a GPU unless it is told
    return parser.parse_args_into_dataclasses(arguments + overrides)
