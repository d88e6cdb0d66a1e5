"""Checkpoints of the original implementations, as `torch.save` writes them."""

import os
import pickle
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch


def load_original_checkpoint(path: str | Path) -> dict:
    r"""
    Read a checkpoint of tensors and plain values (numbers, strings, lists, dicts). Code in it is never run.

    Args:
        path (`str` or `Path`): a file that `torch.save` wrote.

    Returns:
        `dict`: its content, the tensors on the CPU.

    Raises:
        OSError: if there is no such file, or it is cut short or no torch file.
        ValueError: if it holds anything but tensors and plain values, or no dict.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no checkpoint file {path}; give the path of the downloaded .pt or .pth file."
        )
    try:
        checkpoint = torch.load(path, weights_only=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        # The unpickler names the function or class that it will not run; other bytes are no pickle at all.
        refused = re.search(r"GLOBAL ([\w.]+\w)", str(error))
        if refused is None:
            raise OSError(f"{path} is no torch checkpoint, or a damaged one. Download it again.") from error
        raise ValueError(
            f"{path} holds pickled code ({refused[1]}), which is not run. Fetch the checkpoint from its publisher "
            "again, or save its tensors and settings alone with torch.save."
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError, AttributeError) as error:
        raise OSError(f"{path} is cut short, damaged or no torch checkpoint ({error}). Download it again.") from error
    if not isinstance(checkpoint, dict):
        raise ValueError(
            f"{path} holds a {type(checkpoint).__name__}, not the dict of an original checkpoint; give the published "
            "file itself."
        )
    return checkpoint


def save_original_checkpoint(checkpoint: dict, path: str | Path):
    """Write a checkpoint as the original implementations read it, whole or not at all."""
    with written_whole(Path(path)) as partial:
        torch.save(checkpoint, partial)


@contextmanager
def written_whole(out: Path) -> Iterator[Path]:
    """A path to write a file or directory to, which is moved to `out` in the end, and removed after an error."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as temporary:
        yield Path(temporary) / out.name
        os.replace(Path(temporary) / out.name, out)


def check_is_free(out: Path):
    """Raise ValueError if `out` is anything but an empty directory, or none yet."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not empty; name a new directory, or remove it first.")


def check_tensors(
    tensors: dict, expected: dict, original_name: Callable[[str], str], source: str | Path, fits: str, left_over=()
):
    """
    Raise ValueError, by the original's names, unless `tensors` have the names and shapes of `expected`, and nothing of
    the original is `left_over`.
    """
    missing = [original_name(key) for key in expected if key not in tensors]
    left_over = [*left_over, *(original_name(key) for key in tensors if key not in expected)]
    if missing or left_over:
        raise ValueError(f"{source} does not fit {fits}: missing tensors {missing[:5]}, left over {left_over[:5]}.")
    for key, tensor in tensors.items():
        if tensor.shape != expected[key].shape:
            raise ValueError(
                f"{source} does not fit {fits}: {original_name(key)} has shape {tuple(tensor.shape)}, but its place "
                f"in the model has {tuple(expected[key].shape)}."
            )
