"""Column mappings: what a source calls the columns that training reads."""

import difflib

COLUMNS = ("audio", "text", "task", "question", "seconds", "expand_wav")


def map_columns(dataset, names: dict[str, str], path: str):
    """
    A `datasets.Dataset` (or `IterableDataset`) with the columns that training reads, under our names; of `COLUMNS`,
    those it has.

    Args:
        names (`dict[str, str]`): what the source calls a column of `COLUMNS`, where it is not that.
        path (`str`): the source, for errors.

    Raises:
        ValueError: for a source without audio, text, or a column of `names`, with the nearest that it has.
    """
    from datasets import Audio, IterableDataset, Value

    found = dataset.column_names
    theirs = {ours: names.get(ours, ours) for ours in COLUMNS}
    for ours, column in theirs.items():
        if column not in found and (ours in ("audio", "text") or ours in names):
            nearest = difflib.get_close_matches(column, found, n=1)
            hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
            remedy = f"Map it: columns: {{{ours}: NAME}}."
            raise ValueError(f"{path} has no column {column!r}; it has {found}.{hint} {remedy}")
    theirs = {ours: column for ours, column in theirs.items() if column in found}
    # Of a stream, `datasets` would encode an Audio column anew, undecoded or not, which needs torchcodec; and
    # decode it when it renames columns, if it were not cast before.
    undecoded = {"bytes": Value("binary"), "path": Value("string")}
    streams = isinstance(dataset, IterableDataset)
    dataset = dataset.cast_column(theirs["audio"], undecoded if streams else Audio(decode=False))
    dataset = dataset.select_columns(list(theirs.values()))
    return dataset.rename_columns({column: ours for ours, column in theirs.items() if column != ours})
