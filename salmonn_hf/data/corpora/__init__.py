"""
Corpora as others publish them: a file for each, whose `read_examples(root, ...)` gives its examples one by one.

Each example is a row, in the form that Parquet files for training have:

    {"audio": {"bytes": None, "path": str}, "text": str or None, "task": str, "question": str, "source": str}

`task` is one of SALMONN's task names, `question` is "" where the task has none, `source` is the corpus and split.
Where a corpus has them, a row also has `language` (of the text), `testset_id`, and, if its clip is not one complete
file, `start` and `end` (seconds into the file) with `clip_id` (the name of that part), or `expand_wav` (files that
follow the first): `clip_audio.read_clip` gives the clip of any row.

A reader holds one entry of its corpus at a time, and opens no audio: whether a clip is there, readable and of the
right length is checked by `clip_audio.checked_seconds`. Entries that are no example go to
`drop(path, reason, detail)`, which by default raises; nothing is put in their place.

A file that is added here is a corpus of `training/prepare_data.py`, by the file's name.
"""
