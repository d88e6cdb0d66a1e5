"""
Files of every format that soundfile writes, cut, spliced, joined and with bytes of their headers changed: load_audio
gives the right samples or an AudioError, in little time and memory.
"""

import io
import multiprocessing
import resource
import shutil
import subprocess

import numpy as np
import pytest
import soundfile

from salmonn_hf.model.audio import AudioError, load_audio

FORK = multiprocessing.get_context("fork")
SECONDS_EACH, MEMORY_BYTES = 2.0, 4 << 30
UNSIZED = ("IRCAM", "PAF", "PVF", "WVE", "XI", "HTK")  # no length in the header: what is there is all
SELF_TELLING = ("DWVW",)  # subtypes whose samples have no fixed size
HEADER = 120  # bytes from the start, among which most fields are
NUMBERS = (0, 1, 2, 3, 8, 0xFF, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)


def formats():
    pairs = [(form, sub) for form in soundfile.available_formats() for sub in soundfile.available_subtypes(form)]
    return [pair for pair in pairs if pair[0] not in ("RAW", "SD2")]  # no header; two files


def recording(rng, count: int) -> np.ndarray:
    """Something like words: bursts of coloured noise, quiet between them."""
    noise = np.convolve(rng.standard_normal(count), [0.5, 0.3, 0.1], "same")
    return (0.1 * noise * (0.1 + (np.arange(count) // 1500 % 3 > 0))).astype(np.float32)


def valid_file(rng) -> tuple[str, bytes]:
    while True:
        form, subtype = formats()[rng.integers(len(formats()))]
        rate, channels = int(rng.choice([8000, 16_000, 22_050, 44_100, 48_000])), int(rng.integers(1, 3))
        count, stream = int(rng.integers(2000, 20_000)), io.BytesIO()
        samples = np.stack([recording(rng, count) for _ in range(channels)], axis=1)
        try:
            soundfile.write(stream, samples, rate, format=form, subtype=subtype)
        except (soundfile.LibsndfileError, ValueError):  # not every rate and subtype can be written
            continue
        return f"{form} {subtype}", stream.getvalue()


def changed(rng, data: bytes) -> tuple[str, bytes]:
    kind = ("cut", "joined", "header byte", "header field", "spliced in", "spliced out", "bytes")[rng.integers(7)]
    first, last = sorted(int(at) for at in rng.integers(1, len(data), 2))
    copy = bytearray(data)
    if kind == "cut":
        return kind, data[:last]
    if kind == "joined":
        return kind, data + data
    if kind == "spliced in":
        return kind, data[:last] + data[first:last] + data[last:]
    if kind == "spliced out":
        return kind, data[:first] + data[last:]
    if kind == "header byte":
        for at in rng.integers(0, min(len(data), HEADER), 2):
            copy[at] = rng.integers(256)
    elif kind == "header field":
        at, number = 2 * int(rng.integers(0, HEADER // 2)), int(rng.choice([*NUMBERS, len(data), len(data) // 2]))
        copy[at : at + 4] = number.to_bytes(4, ("little", "big")[rng.integers(2)])
    else:
        copy[first : first + 20] = rng.bytes(20)
    return kind, bytes(copy)


def ffmpeg_agrees(data: bytes, waveform: np.ndarray) -> bool | None:
    """Whether FFmpeg decodes as much; `None` if it cannot."""
    if shutil.which("ffmpeg") is None:
        return None
    command = ["ffmpeg", "-v", "quiet", "-i", "-", "-f", "f32le", "-ac", "1", "-ar", "16000", "-"]
    found = subprocess.run(command, input=data, stdout=subprocess.PIPE, timeout=60).stdout
    return abs(len(found) // 4 - len(waveform)) < 2500 if found else None


def fault(seed: int) -> tuple[str, str | None]:
    """What was done to a file, and what is wrong with the result."""
    rng = np.random.default_rng(seed)
    name, data = valid_file(rng)
    kind, broken = changed(rng, data)
    what = f"{seed}: {name} {kind}"
    try:
        whole = load_audio(data)
    except AudioError as error:
        return what, f"a valid file is refused: {error}"
    started = resource.getrusage(resource.RUSAGE_SELF).ru_utime
    try:
        waveform = load_audio(broken)
    except AudioError as error:
        return f"{kind}: refused", None if str(error).startswith("bytes of length") else f"does not name it: {error}"
    except Exception as error:
        return what, f"{type(error).__name__}: {error}"
    if resource.getrusage(resource.RUSAGE_SELF).ru_utime - started > SECONDS_EACH:
        return what, "takes too long"
    if waveform.ndim != 1 or waveform.dtype != np.float32 or not np.isfinite(waveform).all():
        return what, "is no waveform"
    unsized = name.split()[0] in UNSIZED or any(part in name for part in SELF_TELLING)
    if kind == "cut" and not unsized and len(waveform) < len(whole):
        return what, f"{len(waveform)} of {len(whole)} samples without an error"
    if kind == "joined" and not unsized and abs(len(waveform) - 2 * len(whole)) > 1:
        return what, f"{len(waveform)} samples of twice {len(whole)}"
    if kind == "spliced out" and not unsized and "DPCM" not in name and len(waveform) < len(whole):
        agrees = ffmpeg_agrees(broken, waveform)
        return what, None if agrees else f"{len(waveform)} of {len(whole)} samples without an error, FFmpeg {agrees}"
    return f"{kind}: read", None


def work(seed: int, count: int, results):
    limit = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    for number in range(seed, seed + count):
        results.send((number, "", "did not end"))
        results.send((number, *fault(number)))
    results.send(None)


def run(seed: int, count: int) -> tuple[list, set[str]]:
    """
    Faults and outcomes, found in a process of its own: a decoder that hangs, crashes or takes all memory must not take
    the tests with it.
    """
    reading, writing = FORK.Pipe(duplex=False)
    process = FORK.Process(target=work, args=(seed, count, writing), daemon=True)
    process.start()
    writing.close()
    found = {}
    try:
        while reading.poll(60 * SECONDS_EACH) and (result := reading.recv()) is not None:
            found[result[0]] = result[1:]
    except EOFError:
        pass
    process.kill()
    process.join()
    assert len(found) == count or any(wrong for _, wrong in found.values())
    return [result for result in found.items() if result[1][1]], {outcome for outcome, _ in found.values()}


def test_broken_files_are_refused_or_read_right():
    faults, outcomes = run(0, 60)
    assert faults == [] and {"cut: refused", "joined: read"} <= outcomes


@pytest.mark.slow
def test_500_broken_files_are_refused_or_read_right():
    faults, outcomes = run(1000, 500)
    assert faults == [] and {"cut: refused", "joined: read", "header field: read", "bytes: refused"} <= outcomes
