"""The wheel: it holds every room, and what the README shows runs where there is no clone."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import tiny_model, tiny_processor

ROOT = Path(__file__).resolve().parents[1]
CARDS = ("salmonn-lite-small", "salmonn-lite-nano", "salmonn-lite-nano-sounds")
LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
IMPORT_ALL = """
import pkgutil, sys
from importlib import import_module
from pathlib import Path

import salmonn_hf
from salmonn_hf.hub.model_card import make_card

assert salmonn_hf.__file__.startswith(sys.argv[1]), salmonn_hf.__file__
modules = [module.name for module in pkgutil.walk_packages(salmonn_hf.__path__, "salmonn_hf.")]
for name in modules:
    if not name.endswith("__main__"):
        import_module(name)
card = str(make_card(Path(sys.argv[2]), []))
print(len(modules), salmonn_hf.__version__, "Nothing was measured." in card)
"""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy of what git holds, so that the clone stays as it is."""
    pytest.importorskip("setuptools", minversion="64")
    root = tmp_path_factory.mktemp("wheel")
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        (root / "source" / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, root / "source" / name)
    shutil.copytree(ROOT / "salmonn_hf", root / "source" / "salmonn_hf", ignore=shutil.ignore_patterns("__pycache__"))
    pip("wheel", "--no-build-isolation", "--wheel-dir", root, root / "source")
    (built,) = root.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def outside(wheel, tmp_path_factory):
    """A directory with the wheel installed, and the checkpoints (tiny ones) and recordings that the README names."""
    root = tmp_path_factory.mktemp("outside")
    pip("install", "--target", root / "installed", wheel)
    for name in (*(f"model_cards/{card}" for card in CARDS), "runs/mine"):
        model = tiny_model()
        if name == "runs/mine":
            model.add_lora(LORA)
        model.save_pretrained(root / name)
        tiny_processor(model.config).save_pretrained(root / name)
    (root / "eval").mkdir()
    (root / "eval" / "recordings").symlink_to(ROOT / "eval" / "recordings")
    return root


def pip(command, *arguments):
    offline = ["--no-deps", "--no-index", "--quiet", "--disable-pip-version-check"]
    subprocess.run([sys.executable, "-m", "pip", command, *offline, *map(str, arguments)], check=True)


def run(outside, *arguments):
    environment = os.environ | {"PYTHONPATH": str(outside / "installed"), "OMP_NUM_THREADS": "1"}
    arguments = [sys.executable, *map(str, arguments)]
    return subprocess.run(arguments, cwd=outside, env=environment, capture_output=True, text=True, check=False)


def test_it_holds_every_room(wheel):
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    package = [file for file in (ROOT / "salmonn_hf").rglob("*") if file.is_file() and file.suffix != ".pyc"]
    assert held == {str(file.relative_to(ROOT)) for file in package}
    assert {name.split("/")[1] for name in held if name.count("/") == 2} == {
        "model", "base_parts", "convert", "data", "training", "quantization", "evaluation", "hub"
    }  # fmt: skip


def test_every_module_of_it_imports_and_finds_its_files(outside):
    result = run(outside, "-c", IMPORT_ALL, outside, outside / "runs" / "mine")
    assert result.returncode == 0, result.stderr
    count, version, has_card = result.stdout.split()
    assert int(count) > 60 and has_card == "True"
    assert (outside / "installed" / f"salmonn_hf-{version}.dist-info").is_dir()


def test_the_readmes_python_runs(outside):
    snippets = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), flags=re.MULTILINE | re.DOTALL)
    assert len(snippets) >= 2 and any("pipeline(" in snippet for snippet in snippets)
    (outside / "snippets.json").write_text(json.dumps(snippets))
    result = run(outside, "-c", "import json\nfor s in json.load(open('snippets.json')): exec(s)")
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("module", ["salmonn_hf", "salmonn_hf.base_parts", "salmonn_hf.convert", "salmonn_hf.push"])
def test_its_commands_start(outside, module):
    result = run(outside, "-m", module, "--help")
    assert result.returncode == 0 and "usage:" in result.stdout, result.stderr


def test_push_asks_for_the_clip_that_only_a_clone_has(outside):
    result = run(outside, "-m", "salmonn_hf.push", "runs/mine", "alice/mine")
    assert result.returncode == 1
    assert "does not exist; name one with speech as audio (--audio)" in result.stderr
