"""YAML recipes with command-line overrides: `run_stage1.py RECIPE.yaml --learning_rate 1e-4`."""

import difflib
import json
import sys
from pathlib import Path

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
    Dataclass instances from a recipe, its path the first argument, and `--key value` overrides after it. In contrast
    to `HfArgumentParser.parse_yaml_file`, the recipe's values have the types and checks of the command line.

    Raises:
        ValueError: for a key that no dataclass has, with the nearest one; for a key that is there twice; for two that
            contradict each other. What the dataclasses refuse themselves is raised as they do.
    """
    recipe, overrides = {}, sys.argv[1:] if argv is None else argv
    if overrides and not overrides[0].startswith("-"):
        path, *overrides = overrides
        recipe = yaml.load(Path(path).read_text(encoding="utf-8"), _RecipeLoader) or {}
        if not isinstance(recipe, dict):
            kind = type(recipe).__name__
            raise ValueError(f"{path} is not a recipe, a YAML mapping of keys to values, but a {kind}.")
    parser = HfArgumentParser(dataclass_types, allow_abbrev=False)
    known = {action.dest for action in parser._actions}
    overridden = [a.removeprefix("--").split("=")[0] for a in overrides if a.startswith("--")]
    for key in [*recipe, *overridden]:
        if key not in known:
            nearest = difflib.get_close_matches(str(key), known, n=1)
            raise ValueError(f"Unknown recipe key {key!r}." + (f" Did you mean {nearest[0]!r}?" if nearest else ""))
    recipe = {key: value for key, value in recipe.items() if value is not None}
    for pair in CONTRADICTIONS:
        for given in ({key for key, value in recipe.items() if value not in (False, [])}, overridden):
            if all(key in given for key in pair):
                raise ValueError(f"{' and '.join(pair)} contradict each other; keep one of them.")
        if any(key in overridden for key in pair):
            recipe = {key: value for key, value in recipe.items() if key not in pair}
    arguments = []
    for key, value in recipe.items():
        values = value if isinstance(value, list) else [value]
        arguments += [f"--{key}", *(json.dumps(v) if isinstance(v, dict) else str(v) for v in values)]
    return parser.parse_args_into_dataclasses(arguments + overrides)
