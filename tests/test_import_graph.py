"""
The house's rules: which room imports which, no cycles, short files. Read from the source, so that imports inside
functions count as well. Each rule is also shown to catch a file that breaks it.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT
from transformers.dynamic_module_utils import get_imports

PACKAGE = "salmonn_hf"
SCRIPTS = ("training", "eval", "model_cards")  # they may import anything
LOWER = {"model", "files", "terminal"}
ABOVE_DATA = {"evaluation", "quantization", "hub"}
ROOMS = ABOVE_DATA | LOWER | {"base_parts", "convert", "data"}
# What each room, or file beside the rooms, may import of the package besides itself.
ALLOWED = {
    "model": set(),  # it travels in checkpoints
    "files": set(),
    "terminal": set(),
    "default_model": set(),
    "base_parts": LOWER,
    "convert": LOWER | {"base_parts"},
    "data": LOWER,
    "evaluation": LOWER | {"data"},
    "quantization": LOWER | {"data"},
    "hub": LOWER | {"data", "evaluation", "base_parts"},
    "training": LOWER | ABOVE_DATA | {"data", "base_parts"},
    "inference": ROOMS,
    "cli": ROOMS | {"inference", "default_model"},
    "push": {"hub"},  # `python -m salmonn_hf.push`
    "__main__": {"cli"},
    "__init__": LOWER | {"base_parts"},
}
# What a checkpoint's code may need of others: whoever loads a SALMONN has these.
OF_CHECKPOINTS = {
    "huggingface_hub",
    "numpy",
    "safetensors",
    "soundfile",
    "soxr",
    "tokenizers",
    "torch",
    "transformers",
}
MAX_LINES = 500


def modules(root: Path) -> dict[str, Path]:
    """Every module of the package by its dotted name; packages by the name of their directory."""
    files = sorted((root / PACKAGE).rglob("*.py"))
    dotted = [".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__") for file in files]
    return dict(zip(dotted, files, strict=True))


def imported(name: str, file: Path, known: dict[str, Path]) -> Iterator[tuple[str, int]]:
    """What a module imports of the package, wherever it does so: (module, line)."""
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            # `from . import tasks` imports a module, `from .tasks import Task` a name in one
            targets = [f"{base}.{alias.name}" if f"{base}.{alias.name}" in known else base for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            targets = [argument.value for argument in node.args if isinstance(argument, ast.Constant)]
        else:
            continue
        yield from ((target, node.lineno) for target in targets if target in known)


def room(module: str) -> str:
    """The room of a module, or its own name if it lies beside the rooms."""
    return module.split(".")[1] if "." in module else "__init__"


def broken_arrows(root: Path) -> list[str]:
    """Imports that the rules above do not allow, as `FILE:LINE: room -> room (MODULE)`."""
    known = modules(root)
    return [
        f"{file.relative_to(root)}:{line}: {room(name)} -> {room(target)} ({target})"
        for name, file in known.items()
        for target, line in imported(name, file, known)
        if room(target) != room(name) and room(target) not in ALLOWED.get(room(name), set())
    ]


def cycles(root: Path) -> list[str]:
    """Modules that import each other in a circle, as `a -> b -> a`, one circle for each import that closes one."""
    known = modules(root)
    arrows = {name: {target for target, _ in imported(name, file, known)} for name, file in known.items()}
    found, done = [], set()

    def follow(name, path):
        if name in path:
            found.append(" -> ".join([*path[path.index(name) :], name]))
        elif name not in done:
            for target in sorted(arrows[name]):
                follow(target, [*path, name])
            done.add(name)

    for name in arrows:
        follow(name, [])
    return found


def long_files(root: Path) -> list[str]:
    files = [file for directory in (PACKAGE, *SCRIPTS) for file in sorted((root / directory).rglob("*.py"))]
    lengths = {file.relative_to(root): len(file.read_text(encoding="utf-8").splitlines()) for file in files}
    return [f"{file}: {lines} lines" for file, lines in lengths.items() if lines > MAX_LINES]


def misfits_in_model(root: Path) -> list[str]:
    """
    What would not survive in a checkpoint. transformers copies the files that it finds in `from .NAME import`, and
    wants every library installed that is imported outside `try`.
    """
    directory, found = root / PACKAGE / "model", []
    for path in sorted(directory.iterdir()):
        if path.is_dir() and path.name != "__pycache__":
            found.append(f"{path.name}/ is a directory")
        if path.suffix != ".py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level and (node.module is None or "." in node.module):
                found.append(f"{path.name}:{node.lineno}: {ast.unparse(node)}")
        libraries = set(get_imports(path)) - OF_CHECKPOINTS - set(sys.stdlib_module_names)
        found += [f"{path.name} needs {library}" for library in sorted(libraries)]
    return found


def test_imports_go_one_way():
    assert broken_arrows(ROOT) == []


def test_no_module_imports_itself_by_a_detour():
    assert cycles(ROOT) == []


def test_files_are_short():
    assert long_files(ROOT) == []


def test_the_code_of_checkpoints_is_flat_and_needs_no_optional_library():
    assert misfits_in_model(ROOT) == []


def test_git_holds_no_copy_of_a_checkpoints_code():
    listed = subprocess.run(
        ["git", "ls-files", "model_cards/*/*.py"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip(f"not a git checkout: {listed.stderr.strip()}")
    assert listed.stdout == ""


@pytest.fixture
def plant(tmp_path):
    """Write files of a small package that keeps the rules."""

    def write(files):
        for name, text in files.items():
            path = tmp_path / PACKAGE / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path

    write(
        {
            "__init__.py": "from .model.audio import load\n",
            "model/audio.py": "import numpy\nfrom .fbank import bins\n",
            "model/fbank.py": "bins = 128\n",
            "data/__init__.py": "",
            "data/tasks.py": "",
            "data/sources.py": "from . import tasks\nfrom ..model.audio import load\nfrom .. import files\n",
            "evaluation/report.py": "from salmonn_hf.data.sources import Source\n",
            "hub/push.py": "from ..evaluation.report import Run\n",
            "training/trainer.py": "from ..evaluation import report\nfrom ..hub.push import push\n",
            "files.py": "",
            "cli.py": "def main():\n    from .evaluation.report import Run\n",
        }
    )
    return write


def test_a_house_in_order_has_nothing_to_find(plant):
    root = plant({})
    assert not broken_arrows(root) and not cycles(root) and not long_files(root) and not misfits_in_model(root)


@pytest.mark.parametrize(
    ("file", "statement", "arrow"),
    [
        ("model/fbank.py", "from ..files import write", "model/fbank.py:1: model -> files (salmonn_hf.files)"),
        ("model/fbank.py", "from .. import load", "model/fbank.py:1: model -> __init__ (salmonn_hf)"),
        (
            "data/tasks.py",
            "def f():\n    from ..evaluation.report import Run",
            "data/tasks.py:2: data -> evaluation (salmonn_hf.evaluation.report)",
        ),
        (
            "evaluation/report.py",
            "if True:\n    import salmonn_hf.training.trainer as t",
            "evaluation/report.py:2: evaluation -> training (salmonn_hf.training.trainer)",
        ),
        (
            "cli.py",
            "from importlib import import_module\nimport_module('salmonn_hf.training.trainer')",
            "cli.py:2: cli -> training (salmonn_hf.training.trainer)",
        ),
        ("newroom/a.py", "from ..model import audio", "newroom/a.py:1: newroom -> model (salmonn_hf.model.audio)"),
    ],
)
def test_an_arrow_against_the_rules_is_named(plant, file, statement, arrow):
    assert broken_arrows(plant({file: statement})) == [f"{PACKAGE}/{arrow}"]


def test_a_circle_is_named_even_inside_functions(plant):
    root = plant({"model/fbank.py": "def f():\n    from .audio import load\n"})
    assert cycles(root) == ["salmonn_hf.model.audio -> salmonn_hf.model.fbank -> salmonn_hf.model.audio"]
    assert broken_arrows(root) == []


def test_a_long_file_is_named(plant):
    assert long_files(plant({"cli.py": "\n" * 500})) == []
    assert long_files(plant({"cli.py": "\n" * 501})) == [f"{PACKAGE}/cli.py: 501 lines"]


@pytest.mark.parametrize(
    ("file", "statement", "found"),
    [
        ("model/fbank.py", "from . import audio", "fbank.py:1: from . import audio"),
        ("model/fbank.py", "def f():\n    import peft", "fbank.py needs peft"),
        ("model/windows/a.py", "", "windows/ is a directory"),
    ],
)
def test_what_does_not_fit_a_checkpoint_is_named(plant, file, statement, found):
    assert misfits_in_model(plant({file: statement})) == [found]
