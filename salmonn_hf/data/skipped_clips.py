"""Clips that cannot be trained on: the error with the reason, and the list of those that were skipped."""

import logging
from collections import Counter, defaultdict
from pathlib import Path

logger = logging.getLogger(__name__)

LISTED_PATHS = 5  # of each reason, beside the file


class UnusableClip(ValueError):
    """One clip that cannot be trained on: `reason`, the same few words for every such clip, and `detail`."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason} ({detail})" if detail else reason)
        self.reason, self.detail = reason, detail


class SkippedClips:
    """
    Counts the clips that are skipped and lists them in a file. No other clip takes the place of one.

    Args:
        path (`str`, *optional*): a tab-separated file of path, reason and detail, written anew.

    Attributes:
        counts (`Counter`): clips by reason.
        first_paths (`dict[str, list[str]]`): the paths of the first few of each reason.

    Raises:
        OSError: if the file cannot be written.
    """

    def __init__(self, path: str | Path | None = None):
        self.path = path
        self.counts, self.first_paths = Counter(), defaultdict(list)
        if path is not None:
            try:
                Path(path).parent.mkdir(parents=True, exist_ok=True)
                Path(path).write_text("path\treason\tdetail\n", encoding="utf-8")
            except OSError as error:
                raise OSError(f"Cannot write {path} ({error}); name a directory that can be written.") from error

    def add(self, path: str, reason: str, detail: str = ""):
        self.counts[reason] += 1
        if len(self.first_paths[reason]) < LISTED_PATHS:
            self.first_paths[reason].append(path)
        if self.path is not None:
            with open(self.path, "a", encoding="utf-8", errors="backslashreplace") as file:
                file.write("\t".join(" ".join(value.split()) for value in (path, reason, detail)) + "\n")

    def report(self):
        """Log a warning for each reason."""
        for reason, count in self.counts.items():
            first, rest = self.first_paths[reason][0], f"; see {self.path}" * bool(self.path)
            logger.warning("skipped %d clips: %s (first %s)%s", count, reason, first, rest)
