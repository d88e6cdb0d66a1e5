"""The order of an epoch: weights, passes, and clips of similar length together."""

from collections import Counter

import numpy as np

from salmonn_hf.data.mixture_sampler import MixtureSampler
from salmonn_hf.data.sources import Source


class Tables:
    """What the sampler needs of a dataset."""

    def __init__(self, sizes, weights, lengths=None):
        self.tables = [
            type("Table", (list,), {"source": Source(path="x", weight=weight)})(range(size))
            for size, weight in zip(sizes, weights, strict=True)
        ]
        self.lengths = np.ones(sum(sizes)) if lengths is None else np.asarray(lengths)


def epoch_of(sampler, epoch):
    sampler.set_epoch(epoch)
    return list(sampler)


def test_weights_are_shares_of_an_epoch_and_nothing_comes_twice_before_all_have_come():
    sampler = MixtureSampler(Tables([10, 6, 5], [1.0, 0.5, 2.0]), step_size=4, seed=1)
    assert len(sampler) == 10 + 3 + 10
    epochs = [epoch_of(sampler, epoch) for epoch in range(4)]
    for number, items in enumerate(epochs):
        assert len(items) == len(sampler)
        assert sorted(index for _, index in items if index < 10) == list(range(10))
        assert Counter(index for _, index in items if index >= 16) == dict.fromkeys(range(16, 21), 2)
        assert {draw for draw, index in items if index < 10} == {number}
        assert {draw for draw, index in items if index >= 16} == {2 * number, 2 * number + 1}
    for pair in (epochs[:2], epochs[2:]):
        assert sorted(index for items in pair for _, index in items if 10 <= index < 16) == list(range(10, 16))
    assert len({item for items in epochs for item in items}) == 4 * len(sampler)  # no draw comes again


def test_order_is_that_of_its_seed_and_epoch():
    data = Tables([50], [1.0], np.random.default_rng(0).uniform(1, 9, 50))
    sampler, again, other = (MixtureSampler(data, 4, seed) for seed in (1, 1, 2))
    epoch_of(sampler, 0)
    assert epoch_of(sampler, 2) == epoch_of(again, 2)  # whatever came before
    assert epoch_of(sampler, 2) != epoch_of(sampler, 3) and epoch_of(sampler, 2) != epoch_of(other, 2)


def test_clips_of_a_step_are_of_similar_length():
    lengths = np.random.default_rng(0).uniform(1, 30, 4000)
    grouped = [index for _, index in MixtureSampler(Tables([4000], [1.0], lengths), step_size=8)]
    random = [index for _, index in MixtureSampler(Tables([4000], [1.0], lengths), step_size=8, group_by_length=False)]
    assert sorted(grouped) == sorted(random) == list(range(4000))

    def padded(order):
        return lengths[order].reshape(-1, 8).max(1).sum() * 8 / lengths.sum()

    assert padded(grouped) < 1.1 < 1.6 < padded(random)
    assert lengths[grouped[::8]].reshape(-1, 50).std(1).min() > 5  # and long and short steps are mixed
