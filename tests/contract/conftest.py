"""
transformers' own tests of a model, of a processor and of a feature extractor, on tiny SALMONNs: `make test-contract`.
Their files are fetched, see `archive.py`; what those import and the archive lacks is in `stand_ins`.
"""

import sys
from pathlib import Path

import pytest
import torch
from transformers.models.auto import modeling_auto

from .archive import directory
from .known_failures import KNOWN_FAILURES

sys.path[:0] = [str(Path(__file__).parent / "stand_ins"), str(directory())]

# transformers' tests look up what kind of model a class is by its name, in these tables of its own models.
modeling_auto.MODEL_MAPPING_NAMES.update(salmonn="SalmonnModel", beats="BeatsModel")
modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["salmonn"] = "SalmonnForConditionalGeneration"


def pytest_configure(config):
    torch.set_printoptions(threshold=0, edgeitems=1)  # for each tensor that is compared, a message is made at once
    config.addinivalue_line("filterwarnings", "ignore::pytest.PytestUnknownMarkWarning")  # transformers' own marks


def pytest_collection_modifyitems(items):
    for item in items:
        if reason := KNOWN_FAILURES.get(item.nodeid.removeprefix("tests/contract/")):
            item.add_marker(pytest.mark.xfail(strict=True, reason=reason))


def pytest_terminal_summary(terminalreporter):
    counts = {kind: len(terminalreporter.stats.get(kind, ())) for kind in ("passed", "skipped", "xfailed", "failed")}
    counts["failed"] += len(terminalreporter.stats.get("error", ()))
    total = sum(counts.values())
    counts = ", ".join(f"{kind} {count}" for kind, count in counts.items())
    terminalreporter.write_sep("=", f"transformers' own tests: collected {total}, {counts}")
