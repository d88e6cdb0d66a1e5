"""
Make short pieces of music by known General MIDI instruments, with captions, as one Parquet file.

    apt-get install fluidsynth timgm6mb-soundfont
    python training/synthesis/make_synthetic_music.py --output data/music-train.parquet --clips 400 --seed 1

Each is a melody, chords or a rising scale at one of three tempos, in a major or minor key, on one of 29 instruments,
some with drums; so its captions say nothing but what is heard. Columns: `audio` (16 kHz mono 16-bit FLAC), `captions`
(five strings), `label` (the instrument), `kind` ("music") and `seconds`. The same seed gives the same pieces.
"""

import argparse
import struct
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import yaml

from salmonn_hf.data.clip_parquet import write_clips
from salmonn_hf.data.flac import flac_bytes
from salmonn_hf.model.audio import SAMPLING_RATE, load_audio
from salmonn_hf.terminal import command

WORDS = yaml.safe_load(Path(__file__).with_name("music.yaml").read_text(encoding="utf-8"))
INSTRUMENTS, CAPTIONS = WORDS["instruments"], WORDS["captions"]
SCALES = {"major": (0, 2, 4, 5, 7, 9, 11), "minor": (0, 2, 3, 5, 7, 8, 10)}
BEATS_PER_MINUTE = {"slow": (60, 80), "moderate": (95, 120), "fast": (145, 190)}
TICKS = 480  # per beat
DRUM_CHANNEL, KICK, SNARE = 9, 36, 38


class Piece(NamedTuple):
    instrument: str
    texture: str
    tempo: str
    mode: str
    drums: bool
    beats_per_minute: float
    notes: list[tuple[float, float, int, int]]  # start and length in beats, MIDI note, channel


def compose(rng: np.random.Generator, seconds: float) -> Piece:
    instrument, texture = str(rng.choice(list(INSTRUMENTS))), str(rng.choice(list(CAPTIONS)))
    tempo, mode = str(rng.choice(list(BEATS_PER_MINUTE))), str(rng.choice(list(SCALES)))
    beats_per_minute = rng.uniform(*BEATS_PER_MINUTE[tempo])
    beats, lowest = int(seconds * beats_per_minute / 60), INSTRUMENTS[instrument][1] + int(rng.integers(8))
    notes, degree, beat = [], 0, 0.0
    while beat < beats:
        if texture == "chords":
            length, degree = 1.0, int(rng.choice([0, 3, 4, 5]))
            degrees = (degree, degree + 2, degree + 4)
        elif texture == "scale":
            length, degrees, degree = 0.5, (degree % 15,), degree + 1
        else:
            length = float(rng.choice([0.5, 1.0, 1.5]))
            degree = int(np.clip(degree + rng.integers(-3, 4), 0, 9))
            degrees = (degree,)
        notes += [(beat, length, lowest + 12 * (d // 7) + SCALES[mode][d % 7], 0) for d in degrees]
        beat += length
    drums = bool(rng.random() < 0.3)
    if drums:
        notes += [(beat, 0.25, SNARE if beat % 2 else KICK, DRUM_CHANNEL) for beat in map(float, range(beats))]
    return Piece(instrument, texture, tempo, mode, drums, beats_per_minute, notes)


def captions(piece: Piece) -> list[str]:
    a = ("an " if piece.instrument[0] in "aeiou" else "a ") + piece.instrument
    words = {"a": a, "A": a.capitalize(), "drums": " over a drum beat" if piece.drums else ""}
    return [text.format(tempo=piece.tempo, mode=piece.mode, **words) for text in CAPTIONS[piece.texture]]


def midi_file(piece: Piece, rng: np.random.Generator) -> bytes:
    """A Standard MIDI File of format 0 (MIDI 1.0 specification, "Standard MIDI Files")."""
    events = [(0, bytes([0xC0, INSTRUMENTS[piece.instrument][0]]))]
    for start, length, note, channel in piece.notes:
        loudness = int(rng.integers(70, 115))
        events.append((round(start * TICKS), bytes([0x90 | channel, note, loudness])))
        events.append((round((start + 0.95 * length) * TICKS), bytes([0x80 | channel, note, 0])))
    track, now = b"\x00\xff\x51\x03" + round(60e6 / piece.beats_per_minute).to_bytes(3, "big"), 0
    for tick, event in sorted(events, key=lambda event: event[0]):
        track += variable_length(tick - now) + event
        now = tick
    track += b"\x00\xff\x2f\x00"
    return struct.pack(">4sIHHH4sI", b"MThd", 6, 0, 1, TICKS, b"MTrk", len(track)) + track


def variable_length(number: int) -> bytes:
    """Seven bits a byte, the highest first, with the eighth set on all but the last."""
    data = [number & 0x7F]
    while number := number >> 7:
        data.insert(0, 0x80 | number & 0x7F)
    return bytes(data)


def render(midi: bytes, soundfont: Path) -> np.ndarray:
    with tempfile.TemporaryDirectory() as directory:
        score, audio = Path(directory, "piece.mid"), Path(directory, "piece.wav")
        score.write_bytes(midi)
        command = ["fluidsynth", "-ni", "-F", str(audio), "-r", str(SAMPLING_RATE), str(soundfont), str(score)]
        subprocess.run(command, check=True, capture_output=True)
        return load_audio(str(audio))


def make_clip(seed: int, index: int, soundfont: Path) -> dict:
    """A row: a piece of 2.5 to 6 seconds at a random level, with its captions."""
    rng = np.random.default_rng([seed, index])
    seconds = rng.uniform(2.5, 6.0)
    piece = compose(rng, seconds)
    waveform = render(midi_file(piece, rng), soundfont)[: int(seconds * SAMPLING_RATE)]
    waveform = waveform * (rng.uniform(0.1, 0.9) / max(float(np.abs(waveform).max()), 1e-6))
    audio = {"bytes": flac_bytes(waveform), "path": f"{piece.instrument.replace(' ', '-')}-{index}.flac"}
    row = {"audio": audio, "captions": captions(piece), "label": f"{piece.instrument} (rendered)", "kind": "music"}
    return row | {"seconds": len(waveform) / SAMPLING_RATE}


@command
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="the Parquet file to write")
    parser.add_argument("--clips", type=int, default=400)
    parser.add_argument("--soundfont", type=Path, default=Path("/usr/share/sounds/sf2/TimGM6mb.sf2"))
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    if not args.soundfont.exists():
        sys.exit(f"no soundfont {args.soundfont}: apt-get install fluidsynth timgm6mb-soundfont, or give --soundfont")
    rows = [make_clip(args.seed, index, args.soundfont) for index in range(args.clips)]
    write_clips(args.output, rows, rows[0])
    print(f"{args.output}: {len(rows)} clips, {sum(row['seconds'] for row in rows) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
