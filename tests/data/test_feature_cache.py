"""The feature cache: what it holds, its keys, its limit, several processes, and what a kill leaves."""

import multiprocessing
import os
import signal

import pytest
import torch
from conftest import noise, tiny_config, tiny_model, tiny_processor
from test_sources import embedded, flac

from salmonn_hf import BeatsConfig, SalmonnFeatureExtractor
from salmonn_hf.data.encoder_features import encode_clips
from salmonn_hf.data.feature_cache import FeatureCache, clip_key, encoder_identity, open_shard
from salmonn_hf.model.clip_tensors import pad_clips

BEATS = BeatsConfig(
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=32,
    embed_dim=8,
    num_conv_pos_embeddings=8,
    num_conv_pos_embedding_groups=2,
)


def with_sound():
    """A model of both encoders, and its feature extractor."""
    qformer = tiny_config().projector_config.qformer_config.to_dict() | {"encoder_hidden_size": 32}
    config = tiny_config(sound_config=BEATS, qformer_config=qformer)
    return tiny_model(config), SalmonnFeatureExtractor(return_input_values=True)


def inputs(extractor, seconds, seed=0, key=None):
    features = extractor([noise(seconds, seed)], return_tensors="pt")
    clip = {name: features[name][0] for name in ("input_features", "input_values") if name in features}
    return clip | ({"key": key} if key else {})


def test_both_encoders_frames_are_kept_as_they_were(tmp_path):
    model, extractor = with_sound()
    clips = [inputs(extractor, seconds, seed, f"clip{seed}") for seed, seconds in enumerate((1.2, 0.4, 3.0))]
    cache = FeatureCache(tmp_path, "id")
    encoded = encode_clips(model, clips, cache)
    for clip, (seed, seconds) in zip(encoded, enumerate((1.2, 0.4, 3.0)), strict=True):
        alone = model.encode_audio(**extractor([noise(seconds, seed)], return_tensors="pt"))
        for name in ("audio_frames", "sound_frames"):
            torch.testing.assert_close(clip[name], alone[name][0], atol=1e-5, rtol=1e-5)
    cache.flush()
    again = FeatureCache(tmp_path, "id")
    for index, clip in enumerate(encoded):
        kept = again.get(f"clip{index}")
        assert set(kept) == {"audio_frames", "sound_frames"}
        assert all(torch.equal(kept[name], clip[name]) and kept[name].dtype == clip[name].dtype for name in kept)
    # The model need not be asked again, and gives the same from what was kept.
    batch, fresh = pad_clips(encode_clips(None_if_encoding(model), [again.get("clip0"), again.get("clip2")])), {}
    fresh = pad_clips([encoded[0], encoded[2]])
    assert torch.equal(model.project_audio(**batch).embeds, model.project_audio(**fresh).embeds)


class None_if_encoding:
    """A model that must not be asked to encode."""

    def __init__(self, model):
        self.audio_tower = model.audio_tower


def test_a_clips_frames_do_not_depend_on_its_company_to_the_last_bit():
    model, extractor = tiny_model().to(torch.bfloat16), tiny_processor().feature_extractor
    clips = [inputs(extractor, seconds, seed) for seed, seconds in enumerate((1.2, 0.4, 3.0))]
    together = encode_clips(model, clips)
    for clip, encoded in zip(clips, together, strict=True):
        assert torch.equal(encode_clips(model, [clip])[0]["audio_frames"], encoded["audio_frames"])


def test_identity_tells_weights_precision_and_settings():
    model, extractor = tiny_model(), tiny_processor().feature_extractor
    identities = [encoder_identity(model, extractor)]
    assert identities[0] == encoder_identity(tiny_model(), tiny_processor().feature_extractor)
    with torch.no_grad():
        model.projector.query_tokens.add_(1)
    assert identities[0] == encoder_identity(model, extractor)  # which is not an encoder
    with torch.no_grad():
        model.audio_tower.conv1.bias[0] += 1
    identities.append(encoder_identity(model, extractor))
    identities.append(encoder_identity(model.to(torch.bfloat16), extractor))
    identities.append(encoder_identity(model, SalmonnFeatureExtractor(tail_seconds=0.0)))
    assert len(set(identities)) == 4


def test_key_tells_audio_and_speed_and_not_the_name(tmp_path):
    (tmp_path / "a.flac").write_bytes(flac(0.5))
    keys = [
        clip_key(embedded(flac(0.5), "a")),
        clip_key(embedded(flac(0.5), "b", text="other")),
        clip_key({"audio": {"bytes": None, "path": str(tmp_path / "a.flac")}}),
        clip_key(embedded(flac(0.5, seed=1), "a")),
        clip_key(embedded(flac(0.5), "a"), speed=0.9),
        clip_key(embedded(flac(0.5), "a", expand_wav=[str(tmp_path / "a.flac")])),
    ]
    assert keys[0] == keys[1] == keys[2] and len(set(keys)) == 4


def frames(value, count=100):
    return {"audio_frames": torch.full((count, 25), float(value))}  # 10 kB


def test_oldest_shards_go_beyond_the_limit(tmp_path):
    cache = FeatureCache(tmp_path, "id", max_gigabytes=55e-6, shard_megabytes=0.02)
    other = FeatureCache(tmp_path, "id", max_gigabytes=55e-6)
    for index in range(10):
        cache.put(str(index), frames(index))
        if index == 3:
            assert torch.equal(other.get("0")["audio_frames"], frames(0)["audio_frames"])
        for number, file in enumerate(sorted(tmp_path.glob("*/*.safetensors"), key=os.path.getmtime)):
            os.utime(file, (number, number))  # clocks may be coarse
    assert sum(file.stat().st_size for file in tmp_path.glob("*/*")) <= 55_000
    kept = [index for index in range(10) if cache.get(str(index)) is not None]
    assert kept == [6, 7, 8, 9]  # two a shard, two shards
    assert all(torch.equal(cache.get(str(index))["audio_frames"], frames(index)["audio_frames"]) for index in kept)
    open_shard.cache_clear()  # as when it has read many others since
    assert other.get("2") is None  # gone, and no error for the process that knew of it
    shared = FeatureCache(tmp_path, "another encoder", max_gigabytes=15e-6, shard_megabytes=0.01)
    shared.put("x", frames(1))
    assert [file.parent.name for file in tmp_path.glob("*/*.safetensors")] == ["another encoder"]


def write_clips(root, first, last, barrier):
    cache = FeatureCache(root, "id", shard_megabytes=0.03)
    barrier.wait()
    for index in range(first, last):
        cache.put(str(index), frames(index))
        for known in range(first, index + 1):
            assert cache.get(str(known))["audio_frames"][0, 0] == known
    cache.flush()


def test_several_processes_write_and_read_each_others(tmp_path):
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(3)
    ranges = ((0, 20), (10, 30), (10, 30))
    writers = [context.Process(target=write_clips, args=(tmp_path, *ends, barrier)) for ends in ranges]
    reader = FeatureCache(tmp_path, "id")
    assert reader.get("0") is None
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert all(reader.get(str(index))["audio_frames"][0, 0] == index for index in range(30))


def write_and_die(root):
    cache = FeatureCache(root, "id", shard_megabytes=0.03)
    for index in range(3):
        cache.put(str(index), frames(index))
    (cache.directory / ".half.safetensors.partial").write_bytes(b"half")
    cache.put("3", frames(3))
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_kill_loses_the_unfinished_shard_alone(tmp_path):
    writer = multiprocessing.get_context("fork").Process(target=write_and_die, args=(tmp_path,))
    writer.start()
    writer.join()
    cache = FeatureCache(tmp_path, "id")
    assert writer.exitcode == -signal.SIGKILL
    assert [index for index in range(4) if cache.get(str(index)) is not None] == [0, 1, 2]


def test_a_damaged_shard_is_no_shard(tmp_path):
    cache = FeatureCache(tmp_path, "id")
    cache.put("a", frames(1))
    cache.flush()
    (file,) = tmp_path.glob("*/*.safetensors")
    file.write_bytes(file.read_bytes()[:100])
    assert FeatureCache(tmp_path, "id").get("a") is None


def test_a_full_disk_is_named_and_nothing_is_left(tmp_path):
    resource = pytest.importorskip("resource")
    cache = FeatureCache(tmp_path, "id")
    cache.put("a", frames(1, count=10_000))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(OSError, match="feature cache .*feature_cache_gigabytes"):
            cache.flush()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert not list(tmp_path.glob("*/*")) and not list(tmp_path.glob("*/.*"))
