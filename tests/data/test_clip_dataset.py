"""Examples: prompts, texts, augmentation and masks, all drawn by seed, pass and index alone."""

import numpy as np
import pytest
import torch
from conftest import noise, tiny_processor
from test_sources import embedded, flac, write

from salmonn_hf.data import task_prompts
from salmonn_hf.data.augmentation import Augmentation, frame_mask
from salmonn_hf.data.clip_dataset import ClipDataset
from salmonn_hf.data.clip_table import ClipTable
from salmonn_hf.data.encoder_features import num_frames
from salmonn_hf.data.feature_cache import FeatureCache
from salmonn_hf.data.joined_clips import speech_dataset
from salmonn_hf.data.sources import Source


def table(count, seconds=0.4, **source):
    rows = speech_dataset([(noise(seconds, i), f"{i}.flac", f"text {i}") for i in range(count)])
    return ClipTable(Source(path="made", **source), rows)


def empty_table():
    return ClipTable(Source(path="made"), speech_dataset([(noise(0.4), "a.flac", "a")]), min_seconds=1.0)


def dataset(*tables, **settings):
    return ClipDataset(list(tables), tiny_processor().feature_extractor, **settings)


def equal(one, other):
    if set(one) != set(other) or any(one[key] != other[key] for key in set(one) - {"clip"}):
        return False
    return set(one["clip"]) == set(other["clip"]) and all(
        torch.equal(one["clip"][key], other["clip"][key]) for key in one["clip"]
    )


# Examples


def test_every_row_is_found_in_its_table():
    data = dataset(table(3), empty_table(), table(2, seconds=0.8))
    assert len(data) == 5 and data.lengths.tolist() == pytest.approx([0.4] * 3 + [0.8] * 2)
    assert [data[index]["text"] for index in range(5)] == ["text 0", "text 1", "text 2", "text 0", "text 1"]
    assert data[4]["seconds"] == pytest.approx(0.8)
    extractor = tiny_processor().feature_extractor
    expected = extractor([noise(0.8, 1)], return_tensors="pt")["input_features"][0]
    torch.testing.assert_close(data[4]["clip"]["input_features"], expected, atol=1e-2, rtol=0)


def test_prompt_of_the_task_is_drawn_for_each_pass_and_reproducibly():
    data = dataset(table(4, task="audiocaption"), seed=3, system="Be brief.", system_turn=True)
    drawn = [[data[number, index]["messages"] for index in range(4)] for number in range(6)]
    for number, row in enumerate(drawn):
        for index, messages in enumerate(row):
            assert messages == task_prompts.messages("audiocaption", system="Be brief.", draw=(3, number, index))
    assert len({str(messages) for row in drawn for messages in row}) > 3
    # Evaluation asks with the test prompt.
    assert data[2]["messages"] == task_prompts.messages("audiocaption", system="Be brief.")
    assert dataset(table(1))[0, 0]["messages"] is None  # the processor's own request


def test_questions_of_rows_are_asked(tmp_path):
    rows = [embedded(flac(0.4), "a", text="two", question="How many?", task="QA")]
    data = dataset(ClipTable(Source(write(tmp_path / "a.parquet", rows))))
    for number in range(4):
        assert "How many?" in data[number, 0]["messages"][0]["content"][1]["text"]


def test_one_of_several_texts_is_drawn_in_training(tmp_path):
    rows = [embedded(flac(0.4), "a", text=["one", " ", "two", "three"])]
    data = dataset(ClipTable(Source(write(tmp_path / "a.parquet", rows), task="audiocaption")))
    assert {data[number, 0]["text"] for number in range(20)} == {"one", "two", "three"}
    assert data[0]["text"] == "one"


def test_the_most_typical_of_several_texts_is_taken(tmp_path):
    path = write(tmp_path / "a.parquet", [embedded(flac(0.4), "a", text=["a bell", "a dog barks", "the dog barks"])])
    data = dataset(ClipTable(Source(path, typical_text=True)))
    assert {data[number, 0]["text"] for number in range(8)} == {"a dog barks"}
    assert data[0]["texts"] == ["a bell", "a dog barks", "the dog barks"]


def test_augmentation_and_masks_depend_on_seed_pass_and_index_alone():
    settings = {
        "augmentation": Augmentation(
            speed_factors=[0.9, 1.0, 1.1], snr_db=[5.0, 20.0], gain_db=[-6.0, 3.0], time_masks=1
        ),
        "masked_frames": 0.3,
    }
    data, again, other = (dataset(table(3), seed=seed, **settings) for seed in (1, 1, 2))
    torch.manual_seed(5)
    first = [data[2, index] for index in (0, 1, 2)]
    np.random.seed(7)
    assert all(equal(again[2, index], first[index]) for index in (2, 0, 1))
    assert not equal(data[3, 0], first[0]) and not equal(other[2, 0], first[0])


def test_evaluation_is_neither_augmented_nor_masked():
    plain = dataset(table(2))
    augmented = dataset(table(2), augmentation=Augmentation(gain_db=[-6.0, -3.0], time_masks=1), masked_frames=0.3)
    assert equal(plain[1], augmented[1]) and equal(plain[0, 1], plain[1])
    assert not torch.equal(augmented[0, 1]["clip"]["input_features"], plain[1]["clip"]["input_features"])


def test_only_a_share_of_the_clips_is_augmented_and_the_others_are_cached(tmp_path):
    settings = {"augmentation": Augmentation(augmented_share=0.5, gain_db=[-6.0, -3.0])}
    plain, data = dataset(table(3)), dataset(table(3), cache=FeatureCache(tmp_path, "encoder", 1.0), **settings)
    drawn = [(number, index) for number in range(20) for index in range(3)]
    as_they_are = []
    for number, index in drawn:
        clip = data[number, index]["clip"]
        same = torch.equal(clip["input_features"], plain[index]["clip"]["input_features"])
        assert same == ("key" in clip)  # by which its features are kept
        as_they_are.append(same)
    assert 20 < sum(as_they_are) < 40
    for share, count in ((0.0, 6), (1.0, 0)):
        settings["augmentation"] = Augmentation(augmented_share=share, gain_db=[-6.0, -3.0])
        data = dataset(table(3), cache=FeatureCache(tmp_path, "encoder", 1.0), **settings)
        assert sum("key" in data[item]["clip"] for item in drawn[:6]) == count


def test_a_clip_that_cannot_be_decoded_is_named_with_the_reason(tmp_path):
    damaged = flac(3.0)[:-20000]  # its header is whole
    rows = [embedded(damaged, "damaged.flac", text="a"), embedded(flac(0.4), "good.flac", text="b")]
    data = dataset(ClipTable(Source(write(tmp_path / "a.parquet", rows))))
    assert len(data) == 2 and data[0]["path"] == "damaged.flac" and "damaged" in data[0]["skipped"]
    assert data[1]["text"] == "b"


def test_a_clip_longer_than_its_index_says_is_skipped(tmp_path):
    rows = [embedded(flac(31.0), "long.flac", text="a", seconds=2.0)]
    data = dataset(ClipTable(Source(write(tmp_path / "a.parquet", rows))))
    assert "31.0 s" in data[0]["skipped"]


def test_no_usable_clip_at_all_is_an_error():
    with pytest.raises(ValueError, match="No usable clip in made"):
        dataset(empty_table())


def test_speed_of_a_source():
    tone = np.sin(2 * np.pi * 400 * np.arange(16000) / 16000).astype(np.float32)
    slow = ClipTable(Source(path="made", speed=0.8), speech_dataset([(tone, "tone.flac", "one")]))
    features = tiny_processor().feature_extractor([np.zeros(20000, np.float32)], return_tensors="pt")
    assert slow.seconds.tolist() == [1.25]
    assert num_frames(dataset(slow)[0]["clip"]) == features["input_features"].shape[-1] // 2


def test_masked_frames_are_runs_of_about_the_share():
    mask = frame_mask(1000, 0.1, torch.Generator().manual_seed(0))
    assert 0.05 < mask.float().mean() <= 0.102  # runs may overlap
    edges = torch.diff(torch.nn.functional.pad(mask.int(), (1, 1)))
    assert ((edges == -1).nonzero() - (edges == 1).nonzero()).min() >= 6
    for length in (1, 5, 6, 7):
        for seed in range(20):
            assert frame_mask(length, 0.5, torch.Generator().manual_seed(seed)).shape == (length,)
