"""The order of an epoch: how many clips of each source, in which order."""

import numpy as np
import torch

from .clip_dataset import ClipDataset


class MixtureSampler(torch.utils.data.Sampler):
    """
    Which clips come in an epoch, and in which order, as pairs `(pass, index)` for `ClipDataset`.

    A source of weight w gives round(w · clips) of its clips. Each pass over a source has a new random order, and every
    epoch continues where the last one ended. So no clip comes a second time before all of its source have come.

    The epoch is shuffled; then, within 50 steps, clips of similar length are put together, since a batch costs what
    its longest clip does. The order depends on seed and epoch alone: a resumed run needs no other state.

    Args:
        step_size: clips of an optimizer step, over all processes and accumulated batches.
        group_by_length: `False` leaves the shuffled order as it is.
    """

    STEPS_SORTED = 50

    def __init__(self, dataset: ClipDataset, step_size: int, seed: int = 0, group_by_length: bool = True):
        self.sizes = [len(table) for table in dataset.tables]
        self.counts = [round(table.source.weight * len(table)) for table in dataset.tables]
        self.lengths = dataset.lengths
        self.step_size, self.seed, self.group_by_length = step_size, seed, group_by_length
        self.epoch = 0

    def set_epoch(self, epoch: int):
        self.epoch = epoch

    def __len__(self) -> int:
        return sum(self.counts)

    def __iter__(self):
        for number, index in zip(*self._epoch(), strict=True):
            yield int(number), int(index)

    def _epoch(self) -> tuple[np.ndarray, np.ndarray]:
        """Passes and indices in the epoch's order. Apart from `__iter__`, which would hold all that is drawn here."""
        passes, indices, start = [], [], 0
        for part, (size, count) in enumerate(zip(self.sizes, self.counts, strict=True)):
            if count:
                numbers, places = np.divmod(np.arange(self.epoch * count, (self.epoch + 1) * count), size)
                for number in np.unique(numbers):
                    order = np.random.default_rng([self.seed, part, int(number)]).permutation(size)
                    indices.append(start + order[places[numbers == number]])
                passes.append(numbers)
            start += size
        passes, indices = np.concatenate(passes), np.concatenate(indices)
        rng = np.random.default_rng([self.seed, self.epoch])
        order = rng.permutation(len(indices))
        if self.group_by_length:
            order = self._grouped(order, self.lengths[indices[order]], rng)
        return passes[order], indices[order]

    def _grouped(self, order: np.ndarray, lengths: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        grouped = np.empty_like(order)
        for start in range(0, len(order), self.step_size * self.STEPS_SORTED):
            part = slice(start, start + self.step_size * self.STEPS_SORTED)
            chunk = order[part][np.argsort(-lengths[part], kind="stable")]
            steps = chunk[: len(chunk) // self.step_size * self.step_size].reshape(-1, self.step_size)
            grouped[part] = np.concatenate([rng.permutation(steps).reshape(-1), chunk[steps.size :]])
        return grouped
