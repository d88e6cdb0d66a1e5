"""YAML recipes with command-line overrides: `run_stage1.py RECIPE.yaml --learning_rate 1e-4`."""

import difflib
import json
import sys

import torch
import yaml
from transformers import HfArgumentParser


def parse_recipe(dataclass_types, argv: list[str] | None = None):
    """
    Dataclass instances from a recipe, its path the first argument, and `--key value` overrides after it.

    Raises:
        ValueError: for a key that no dataclass has; the message gives the nearest one.
    """
    argv = sys.argv[1:] if argv is None else argv
    recipe, overrides = {}, argv
    if argv and not argv[0].startswith("-"):
        with open(argv[0]) as file:
            recipe = yaml.safe_load(file) or {}
        overrides = argv[1:]
    parser = HfArgumentParser(dataclass_types, allow_abbrev=False)
    known = {action.dest for action in parser._actions}
    given = [*recipe, *(a.removeprefix("--").split("=")[0] for a in overrides if a.startswith("--"))]
    for key in given:
        if key not in known and key != "help":
            nearest = difflib.get_close_matches(key, known, n=1)
            raise ValueError(f"Unknown recipe key {key!r}." + (f" Did you mean {nearest[0]!r}?" if nearest else ""))
    arguments = []
    for key, value in recipe.items():
        if value is None:
            continue
        values = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else value]
        arguments += [f"--{key}", *map(str, values)]
    if "use_cpu" in known and not torch.accelerator.is_available():
        arguments += ["--use_cpu", "true"]  # Trainer refuses bf16 on a machine without a GPU unless it is told
    return parser.parse_args_into_dataclasses(arguments + overrides)
