"""Augmentation against first principles: measured ratios, levels, lengths and pitches; masks within their bounds."""

import dataclasses

import numpy as np
import pytest
import soundfile
import torch
from conftest import noise

from salmonn_hf.data.augmentation import Augmentation, add_noise, change_speed, pink_noise, white_noise
from salmonn_hf.model.audio import AudioError
from salmonn_hf.training.recipe import parse_recipe

EVERYTHING = Augmentation(
    speed_factors=[0.9, 1.0, 1.1], snr_db=[5.0, 25.0], noise_probability=1.0, gain_db=[-12.0, 6.0]
)


def rng(seed=0):
    return np.random.default_rng(seed)


def tone(frequency=1000.0, seconds=2.0, amplitude=0.5):
    return (amplitude * np.sin(2 * np.pi * frequency * np.arange(int(seconds * 16000)) / 16000)).astype(np.float32)


def decibels(signal, reference):
    return 10 * np.log10(np.mean(np.square(signal, dtype=float)) / np.mean(np.square(reference, dtype=float)))


def pitch(waveform):
    """The strongest frequency in Hz, to half a bin."""
    spectrum = np.abs(np.fft.rfft(waveform * np.hanning(len(waveform))))
    return spectrum.argmax() * 16000 / len(waveform)


# Waveforms


def test_nothing_changes_by_default():
    clip = noise(0.5)
    np.testing.assert_array_equal(Augmentation().augment(clip, rng()), clip)


@pytest.mark.parametrize("snr_db", [-5.0, 0.0, 12.5, 40.0])
def test_signal_to_noise_ratio_is_as_asked(snr_db):
    clip = 0.1 * tone()
    augmentation = Augmentation(snr_db=[snr_db, snr_db], noise_probability=1.0)
    for seed in range(4):  # both white and pink
        noisy = augmentation.augment(clip, rng(seed))
        assert np.abs(noisy).max() < 1  # else the level was lowered, and the difference is not the noise
        assert decibels(clip, noisy.astype(float) - clip) == pytest.approx(snr_db, abs=0.1)


def test_ratio_is_drawn_from_its_range_and_noise_with_its_probability():
    clip, augmentation = 0.01 * tone(seconds=0.1), Augmentation(snr_db=[5.0, 15.0], noise_probability=0.25)
    differences = [augmentation.augment(clip, rng(seed)).astype(float) - clip for seed in range(400)]
    ratios = [decibels(clip, difference) for difference in differences if difference.any()]
    assert 70 < len(ratios) < 130  # 100 expected, standard deviation 8.7
    assert 4.9 < min(ratios) < 6 and 14 < max(ratios) < 15.1


@pytest.mark.parametrize("colour, slope", [(white_noise, 0.0), (pink_noise, -10.0)])
def test_colours_of_noise(colour, slope):
    power = np.abs(np.fft.rfft(colour(1 << 17, rng()))) ** 2
    bands = [10 * np.log10(power[low : 2 * low].mean()) for low in 2 ** np.arange(8, 16)]
    # dB for each octave; pink noise loses 10 · log10(2) of them.
    assert np.polyfit(np.arange(8), bands, 1)[0] == pytest.approx(slope * np.log10(2), abs=0.1)


def test_noise_of_files_is_cut_or_repeated(tmp_path):
    files = {"long": tone(440, seconds=3.0), "short": tone(440, seconds=0.25)}  # 110 whole periods
    clip, snr_db = 0.1 * tone(3000, seconds=1.0), 10.0
    for name, waveform in files.items():
        soundfile.write(tmp_path / f"{name}.wav", waveform, 16000, subtype="FLOAT")
        augmentation = Augmentation(
            snr_db=[snr_db, snr_db], noise_probability=1.0, noise_files=[str(tmp_path / f"{name}.wav")]
        )
        added = augmentation.augment(clip, rng(1)).astype(float) - clip
        assert decibels(clip, added) == pytest.approx(snr_db, abs=0.1)
        # All of it is the tone of 440 Hz, without a gap.
        assert pitch(added) == pytest.approx(440, abs=1)
        assert np.square(added.reshape(20, -1)).mean(1).min() > 0.5 * np.square(added).mean()


def test_each_noise_file_is_drawn_and_long_ones_anywhere(tmp_path):
    files = [str(tmp_path / f"{frequency}.wav") for frequency in (300, 600, 900)]
    for file, frequency in zip(files, (300, 600, 900), strict=True):
        sweep = np.concatenate([tone(frequency, 0.5, 0.1), tone(frequency, 0.5, 0.9)])
        soundfile.write(file, sweep, 16000, subtype="FLOAT")
    augmentation = Augmentation(snr_db=[0.0, 0.0], noise_probability=1.0, noise_files=files)
    clip = 0.1 * tone(3000, seconds=0.5)
    added = [augmentation.augment(clip, rng(seed)).astype(float) - clip for seed in range(30)]
    assert {round(pitch(noise) / 300) for noise in added} == {1, 2, 3}
    # Where in the file the segment began shows in where it gets louder.
    ratios = {round(decibels(noise[:4000], noise[4000:]), 1) for noise in added}
    assert len(ratios) > 10


@pytest.mark.parametrize("gain_db", [-20.0, -6.0, 0.0, 5.0])
def test_gain_is_exact(gain_db):
    clip = tone(amplitude=0.5)
    result = Augmentation(gain_db=[gain_db, gain_db]).augment(clip, rng())
    np.testing.assert_allclose(result, clip * 10 ** (gain_db / 20), rtol=1e-6)


def test_gain_stops_at_full_scale_without_clipping():
    clip = tone(amplitude=0.5)
    result = Augmentation(gain_db=[20.0, 20.0]).augment(clip, rng())
    assert np.abs(result).max() == 1
    np.testing.assert_allclose(result, clip / np.abs(clip).max(), rtol=1e-6)  # the same shape: no sample is clipped


def test_loud_noise_lowers_the_whole_and_keeps_the_ratio():
    clip = tone(amplitude=0.9)
    result = Augmentation(snr_db=[0.0, 0.0], noise_probability=1.0).augment(clip, rng()).astype(float)
    assert np.abs(result).max() == pytest.approx(1, abs=1e-6)
    level = np.dot(result, clip) / np.dot(clip, clip)  # of the clip in the mix, by projection
    assert level < 0.9 and decibels(level * clip, result - level * clip) == pytest.approx(0, abs=0.2)


@pytest.mark.parametrize("speed", [0.9, 1.1, 1.25])
def test_speed_changes_length_and_pitch(speed):
    clip = tone(1000, seconds=2.0)
    result = Augmentation(speed_factors=[speed]).augment(clip, rng())
    assert abs(len(result) - len(clip) / speed) <= 1
    assert pitch(result) == pytest.approx(1000 * speed, abs=1)
    assert decibels(result[800:-800], clip) == pytest.approx(0, abs=0.05)
    np.testing.assert_array_equal(result, change_speed(clip, speed))


def test_clip_is_not_stretched_past_what_the_encoder_hears():
    augmentation = Augmentation(speed_factors=[0.5])
    assert len(augmentation.augment(noise(15.0), rng())) == 480000
    assert len(augmentation.augment(noise(15.1), rng())) == len(noise(15.1))


def test_each_speed_is_drawn():
    lengths = [len(Augmentation(speed_factors=[0.9, 1.0, 1.1]).augment(noise(0.1), rng(seed))) for seed in range(30)]
    assert len(set(lengths)) == 3 and min(np.unique(lengths, return_counts=True)[1]) >= 3


def test_generator_alone_decides():
    clip = noise(0.5)
    results = [EVERYTHING.augment(clip, rng(seed)) for seed in (1, 1, 2)]
    np.testing.assert_array_equal(results[0], results[1])
    assert results[0].shape != results[2].shape or not np.array_equal(results[0], results[2])
    np.random.seed(0)
    np.testing.assert_array_equal(EVERYTHING.augment(clip, rng(1)), results[0])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_input_is_left_as_it_is(dtype):
    clip = noise(0.5).astype(dtype)
    clip.flags.writeable = False
    before = clip.copy()
    for augmentation in (Augmentation(), EVERYTHING, Augmentation(gain_db=[3.0, 3.0])):
        result = augmentation.augment(clip, rng())
        assert result.dtype == np.float32 and result.ndim == 1 and not np.shares_memory(result, clip)
        assert np.isfinite(result).all() and np.abs(result).max() <= 1
    np.testing.assert_array_equal(clip, before)


def test_silence_stays_silence_and_silent_noise_adds_nothing():
    silence = np.zeros(8000, np.float32)
    for seed in range(4):
        result = EVERYTHING.augment(silence, rng(seed))
        assert len(result) > 7000 and not result.any() and np.isfinite(result).all()
    clip = noise(0.5)
    np.testing.assert_array_equal(add_noise(clip, silence, 0.0), clip)


@pytest.mark.parametrize("samples", [1, 2, 7])
def test_shortest_clips(samples):
    for seed in range(6):
        result = EVERYTHING.augment(np.full(samples, 0.1, np.float32), rng(seed))
        assert len(result) >= 1 and np.isfinite(result).all()


# SpecAugment


def spec_augment(features, mask, generator, **policy):
    """Two masks of each kind where the policy does not say otherwise."""
    return Augmentation(**{"time_masks": 2, "frequency_masks": 2} | policy).mask_features(features, mask, generator)


def masked_spans(clips=64, bins=80, frames=400, seed=0, **settings):
    """Ramps that no mean value equals, and what is masked of them: rows of frames, rows of bins."""
    features = torch.arange(clips * bins * frames, dtype=torch.float64).sqrt().reshape(clips, bins, frames)
    lengths = torch.linspace(20, frames, clips).long()
    mask = (torch.arange(frames) < lengths[:, None]).int()
    result = spec_augment(features, mask, torch.Generator().manual_seed(seed), **settings)
    changed = result != features
    return changed.all(1), changed.all(2), changed, mask, lengths


def widest_run(row):
    runs = "".join("x" if value else " " for value in row.tolist()).split()
    return max(map(len, runs), default=0)


def test_time_masks_are_within_their_bounds():
    in_time, _, changed, mask, lengths = masked_spans(
        time_masks=1, time_mask_frames=40, time_mask_share=0.2, frequency_masks=0
    )
    widths = in_time.sum(-1)
    assert torch.equal(changed, in_time[:, None].expand_as(changed))  # whole frames, of all bins
    assert [widest_run(row) for row in in_time] == widths.tolist()  # each in one piece
    assert (widths <= torch.clamp(lengths // 5, max=40)).all()
    assert not (in_time & ~mask.bool()).any()  # padding is left alone
    assert widths.max() > 30 and widths.float().mean() > 10  # and they are drawn from all of the range


def test_frequency_masks_are_within_their_bounds():
    _, _, changed, mask, _ = masked_spans(time_masks=0, frequency_masks=1, frequency_mask_bins=10)
    in_bins = changed[:, :, 0]
    assert torch.equal(changed, in_bins[:, :, None] & mask.bool()[:, None])  # whole bins, of own frames
    widths = in_bins.sum(-1)
    assert [widest_run(row) for row in in_bins] == widths.tolist()
    assert widths.max() == 10 and widths.min() == 0 and 4 < widths.float().mean() < 6
    assert in_bins.any(0).float().mean() > 0.9  # anywhere


def test_masks_reach_both_ends():
    in_time, *_, lengths = masked_spans(clips=512, frames=30, bins=4, time_masks=1, frequency_masks=0)
    assert in_time[:, 0].any() and in_time[torch.arange(512), lengths - 1].any()


def test_short_clips_in_a_long_batch_are_masked_as_often():
    features, mask = torch.randn(512, 4, 1000, generator=torch.Generator().manual_seed(1)), torch.zeros(512, 1000)
    mask[:, :20] = 1
    result = spec_augment(features, mask, torch.Generator().manual_seed(0), time_masks=1, frequency_masks=0)
    # A width of 0 to 4 frames: 2 on average, its standard error 0.06.
    assert (result != features).all(1).sum(-1).float().mean() == pytest.approx(2, abs=0.3)


def test_neither_all_frames_nor_all_bins_are_masked():
    settings = {"time_masks": 3, "time_mask_frames": 1000, "time_mask_share": 0.33}
    for seed in range(10):
        _, _, changed, mask, lengths = masked_spans(
            clips=128, bins=10, frames=60, seed=seed, frequency_masks=3, frequency_mask_bins=3, **settings
        )
        kept = ~changed & mask.bool()[:, None]
        assert (kept.any(1).sum(-1) >= 1).all() and (kept.any(2).sum(-1) >= 1).all()


def test_masked_places_hold_the_mean_of_the_clips_own_frames():
    features = torch.randn(2, 8, 50, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 50, dtype=torch.long)
    mask[1, 20:] = 0
    features[1, :, 20:] = 1e6  # padding must not count
    before = features.clone()
    result = spec_augment(
        features, mask, torch.Generator().manual_seed(3), frequency_masks=1, frequency_mask_bins=4, time_masks=2
    )
    assert torch.equal(features, before)
    for clip, length in ((0, 50), (1, 20)):
        changed = result[clip] != features[clip]
        assert changed.any()
        expected = features[clip, :, :length].mean()
        torch.testing.assert_close(result[clip][changed], expected.expand(changed.sum()))
    assert torch.equal(result[1, :, 20:], features[1, :, 20:])


def test_spec_augment_depends_on_its_generator_alone():
    features, mask = torch.randn(3, 80, 200), torch.ones(3, 200)
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(len(results))
        results.append(spec_augment(features, mask, torch.Generator().manual_seed(seed)))
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


def test_spec_augment_of_silence_short_clips_and_half_precision():
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        features = torch.full((3, 80, 3000), 1.5, dtype=dtype)
        mask = torch.ones(3, 3000)
        mask[1, 1:], mask[2] = 0, 0  # a clip of one frame, and one of none
        result = spec_augment(features, mask, torch.Generator().manual_seed(0))
        assert result.dtype == dtype and torch.equal(result, features)  # the mean of a constant


def test_policy_is_taken_from_the_fields():
    policy = Augmentation(
        time_masks=1, time_mask_frames=9, time_mask_share=0.5, frequency_masks=2, frequency_mask_bins=3
    )
    features, mask = torch.randn(2, 80, 100), torch.ones(2, 100)
    masked = [
        policy.mask_features(features, mask, torch.Generator().manual_seed(seed)) != features for seed in range(20)
    ]
    assert max(int(changed.all(1).sum(-1).max()) for changed in masked) == 9
    assert 3 < max(int(changed.all(2).sum(-1).max()) for changed in masked) <= 6
    assert torch.equal(Augmentation().mask_features(features, mask, torch.Generator()), features)


# The recipe


def test_fields_are_keys_of_a_recipe(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("gain_db: [-12, 6]\nspeed_factors: [0.9, 1.0, 1.1]\ntime_masks: 2\n")
    (augmentation,) = parse_recipe(Augmentation, [str(recipe), "--snr_db", "-5", "20"])
    assert augmentation == Augmentation(
        gain_db=[-12.0, 6.0], speed_factors=[0.9, 1.0, 1.1], time_masks=2, snr_db=[-5.0, 20.0]
    )
    with pytest.raises(dataclasses.FrozenInstanceError):
        augmentation.time_masks = 3


@pytest.mark.parametrize(
    "field, value",
    [
        ("snr_db", [20.0, 5.0]),
        ("gain_db", [3.0]),
        ("speed_factors", [0.0, 1.0]),
        ("noise_probability", 1.5),
        ("augmented_share", -0.1),
        ("time_masks", 5),  # of a fifth of the clip each
    ],
)
def test_values_that_cannot_be_drawn_from_are_refused(field, value):
    with pytest.raises(ValueError, match=rf"{field.replace('time_masks', 'time masks')}.*(give|lower)"):
        Augmentation(**{field: value})


def test_noise_file_that_is_absent_or_no_audio_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent.wav"):
        Augmentation(noise_files=["absent.wav"])
    (tmp_path / "text.wav").write_text("no audio")
    augmentation = Augmentation(noise_files=[str(tmp_path / "text.wav")], snr_db=[0.0, 0.0], noise_probability=1.0)
    with pytest.raises(AudioError, match="text.wav"):
        augmentation.augment(noise(0.1), rng())


def test_frequency_masks_that_could_cover_all_bins_are_refused():
    with pytest.raises(ValueError, match="could cover all 30 mel bins"):
        spec_augment(torch.zeros(1, 30, 50), torch.ones(1, 50), torch.Generator(), frequency_mask_bins=15)
