"""Commands whose output is cut off, or cannot be printed."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROGRAM = """
import argparse, sys
from salmonn_hf.terminal import command

@command
def main():
    argparse.ArgumentParser(description="x" * 100).parse_args()
    for line in range({lines}):
        print(line, {name!r})
    return 3

sys.exit(main())
"""


def start(*arguments, lines=100_000, name="", **settings):
    command = [sys.executable, "-c", PROGRAM.format(lines=lines, name=name), *arguments]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT, **settings)


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_a_reader_that_stops_early_sees_no_traceback(arguments):
    if arguments:  # a short output, written at the end
        reading, writing = os.pipe()
        os.close(reading)
        process = start(*arguments, stdout=writing)
        os.close(writing)
    else:
        process = start(stdout=subprocess.PIPE)
        assert process.stdout.readline() == "0 \n"
        process.stdout.close()
    assert process.stderr.read() == "" and process.wait() == (0 if arguments else 141)  # argparse does not mind


def test_what_the_terminal_cannot_print_is_printed_as_escapes():
    process = start(
        lines=1, name="\xe9 \udce9", stdout=subprocess.PIPE, env=os.environ | {"PYTHONIOENCODING": "ascii"}
    )
    assert process.communicate() == ("0 \\xe9 \\udce9\n", "") and process.returncode == 3


def test_every_script_is_such_a_command():
    scripts = [file for room in ("eval", "training", "model_cards") for file in (ROOT / room).rglob("*.py")]
    scripts += [ROOT / "salmonn_hf" / name for name in ("cli.py", "hub/push.py", "convert/__main__.py")]
    mains = {
        file.relative_to(ROOT): [ast.unparse(decorator) for decorator in node.decorator_list]
        for file in scripts
        for node in ast.parse(file.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and node.name == "main"
    }
    assert len(mains) > 15
    assert {file for file, decorators in mains.items() if "command" not in decorators} == set()
