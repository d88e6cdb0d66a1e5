"""docs/private_apis.md names every private part of another library that is used, and the files that use it."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FILES = [file for folder in ("salmonn_hf", "training", "eval") for file in (ROOT / folder).rglob("*.py")]


def rows():
    """Names and files of each row of the tables."""
    for line in (ROOT / "docs" / "private_apis.md").read_text().splitlines():
        if line.startswith("| `"):
            use, files, *_ = line.strip("| ").split(" | ")
            yield re.findall("`([^`]+)`", use), re.findall("`([^`]+)`", files)


def own_names(trees) -> set[str]:
    """What the repository itself defines: functions, and attributes that it sets on `self`."""
    nodes = [node for tree in trees for node in ast.walk(tree)]
    functions = {node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))}
    return functions | {n.attr for n in nodes if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)}


def is_super(node) -> bool:
    return isinstance(node, ast.Call) and getattr(node.func, "id", "") == "super"


def test_each_use_is_in_the_table():
    trees = {file: ast.parse(file.read_text()) for file in FILES}
    own, missing = own_names(trees.values()), []
    listed = {(name, file) for names, files in rows() for name in names for file in files}
    for file, tree in trees.items():
        for node in ast.walk(tree):
            # A named tuple's `_replace` is documented.
            if isinstance(node, ast.Attribute) and re.match("_(?!replace$)[a-z]", node.attr):
                place = (node.attr, str(file.relative_to(ROOT)))
                if (node.attr not in own or is_super(node.value)) and place not in listed:
                    missing.append(place)
    assert not missing


def test_each_row_is_up_to_date():
    for names, files in rows():
        texts = {file: (ROOT / file).read_text() for file in files}
        for name in names:
            assert any(name in text for text in texts.values()), (name, files)
        for file, text in texts.items():
            assert any(name in text for name in names), (names, file)
