"""
Write the files of this directory from the full set of numbers of the original implementation.

    python tests/golden/make_golden.py DIRECTORY_OF_THE_FULL_SET

What no test compares is left out, and the three largest tensors are kept at some of their frames only, so that the
repository stays small; no number that is kept is changed.
"""

import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

HERE = Path(__file__).parent
WHOLE = ("beats_tiny.pt", "beats_tiny_finetuned.pt", "llm_gemma2_tiny", "salmonn_tiny_gemma2.pth", "whisper_tiny")
LEFT_OUT = ("shortbatch", "batch.features_head", "padding_mask", "pos_conv", "no_attn_softcap")
THINNED = {  # name in the full set: (name here, axis, one of so many along it)
    "whisper.last_hidden_state": ("whisper.last_hidden_state_every10", 1, 10),
    "batch.spectrogram_every8": ("batch.spectrogram_every32", 2, 4),
    "connector.concat_every5": ("connector.concat_every25", 1, 5),
}


def thin(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of a file of the full set as they are kept here."""
    kept = {}
    for key, tensor in tensors.items():
        if key in THINNED:
            key, axis, step = THINNED[key]
            tensor = tensor.index_select(axis, torch.arange(0, tensor.shape[axis], step))
        if not any(part in key for part in LEFT_OUT):
            kept[key] = tensor.contiguous()
    return kept


def main(source: Path):
    for name in WHOLE:
        copy = shutil.copytree if (source / name).is_dir() else shutil.copyfile
        copy(source / name, HERE / name)
    for name in ("beats_golden", "salmonn_golden_encoders", "salmonn_golden_gemma2"):
        save_file(thin(load_file(source / f"{name}.safetensors")), HERE / f"{name}.safetensors")
    description = json.loads((source / "salmonn_golden_gemma2.json").read_text())
    kept = {key: description[key] for key in ("file", "encoders_file", "clips", "token_ids", "connector", "lora")}
    (HERE / "salmonn_golden_gemma2.json").write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
