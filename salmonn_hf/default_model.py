"""The model that is used where none is named."""

import os
from pathlib import Path

NAME = "salmonn-lite-small"
HUB_NAME = f"salmonn-hf/{NAME}"
HOW_TO_GET = (
    f"No model was named, and the default, {NAME}, is neither in a clone of the project beside this package nor, as "
    f"{HUB_NAME}, on the hub. Name a checkpoint with --model or in $SALMONN_MODEL; the project's repository has "
    f"one in model_cards/{NAME}."
)


def default_model() -> str:
    """`$SALMONN_MODEL`; else the clone's own `model_cards/salmonn-lite-small`; else that model's name on the hub."""
    in_clone = Path(__file__).resolve().parents[1] / "model_cards" / NAME
    return os.environ.get("SALMONN_MODEL") or (str(in_clone) if (in_clone / "config.json").is_file() else HUB_NAME)
