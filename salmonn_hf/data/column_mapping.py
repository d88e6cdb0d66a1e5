"""Column mappings: what a source calls the columns that training reads."""

import difflib

from .undecoded_audio import undecoded

COLUMNS = ("audio", "text", "task", "question", "seconds", "expand_wav")


def map_columns(dataset, names: dict[str, str], path: str, needed: tuple[str, ...] = ("audio", "text")):
    """
    A `datasets.Dataset` (or `IterableDataset`) with the columns that training reads, under our names; of `COLUMNS`,
    those it has.

    Args:
        names (`dict[str, str]`): what the source calls a column of `COLUMNS`, where it is not that.
        path (`str`): the source, for errors.
        needed (`tuple[str, ...]`): columns that it must have.

    Raises:
        ValueError: for a source without a column of `needed` or of `names`, with the nearest that it has.
    """
    found = dataset.column_names
    theirs = {ours: names.get(ours, ours) for ours in COLUMNS}
    for ours, column in theirs.items():
        if column not in found and (ours in needed or ours in names):
            nearest = difflib.get_close_matches(column, found, n=1)
            hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
            remedy = f"Map it: columns: {{{ours}: NAME}} of the source"
            remedy += "; of train_files and eval_file by --text_column NAME." if ours == "text" else "."
            raise ValueError(f"{path} has no column {column!r}; it has {found}.{hint} {remedy}")
    theirs = {ours: column for ours, column in theirs.items() if column in found}
    if "audio" in theirs:
        dataset = undecoded(dataset, theirs["audio"])
    dataset = dataset.select_columns(list(theirs.values()))
    return dataset.rename_columns({column: ours for ours, column in theirs.items() if column != ours})
