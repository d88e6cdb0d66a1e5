"""
Transcribe, caption or question audio files from the command line.

    salmonn transcribe interview.mp3
    salmonn transcribe *.flac --format srt --output_dir subtitles
    salmonn caption street.wav --model CHECKPOINT --format json
    salmonn ask street.wav "Is anyone speaking?" --model CHECKPOINT

Audio of any length is cut at pauses, and each segment is answered for itself: nothing of it is lost. The answers go
to the standard output, progress and errors to the standard error. The exit code is 0 if every file was answered, 1 if
some could not be read (the others were answered), 2 if nothing could be done.
"""

import argparse
import json
import sys
from pathlib import Path
from tempfile import TemporaryFile

import numpy as np
from tqdm import tqdm

from .data.task_prompts import TEST_PROMPTS
from .default_model import HOW_TO_GET, HUB_NAME, default_model
from .files import write_atomically
from .model.audio import SAMPLING_RATE, AudioError, load_audio
from .model.segmentation import TARGET_SECONDS, is_silent, speech_segments, split_at_pauses
from .terminal import command

SUFFIXES = {"plain": ".txt", "json": ".json", "srt": ".srt"}


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="salmonn", description=__doc__, formatter_class=raw)
    tasks = parser.add_subparsers(dest="task", required=True, metavar="transcribe|caption|ask")
    helps = {"transcribe": "what is said", "caption": "what can be heard", "ask": "the answer to the last argument"}
    for task, text in helps.items():
        command = tasks.add_parser(task, help=text)
        command.add_argument("files", nargs="+", metavar="FILE", help="audio files or URLs")
        if task == "ask":
            command.add_argument("question", metavar="QUESTION", help="what is asked of each file")
        command.add_argument("--model", help="checkpoint; default: $SALMONN_MODEL, else salmonn-lite-small")
        command.add_argument("--format", choices=SUFFIXES, default="plain", help="default: %(default)s")
        command.add_argument("--output_dir", type=Path, help="write a file for each input instead")
        command.add_argument("--batch_size", type=int, default=8, help="segments at once; default: %(default)s")
        command.add_argument("--dtype", help="default: the checkpoint's, or float32 on CPUs without bfloat16")
        command.add_argument("--device", help="default: the GPU, where there is one")
    arguments = parser.parse_args(argv)
    if arguments.format == "srt" and len(arguments.files) > 1 and arguments.output_dir is None:
        parser.error("several files make several subtitle files: give --output_dir")
    if arguments.output_dir is not None:
        names = [output_name(file, arguments.format) for file in arguments.files]
        if twice := {name for name in names if names.count(name) > 1}:
            parser.error(f"several files would be written to {min(twice)}; do them one by one")
    return arguments


def output_name(file: str, form: str) -> str:
    return Path(file).stem + SUFFIXES[form]


def answer_file(model, waveform: np.ndarray, prompt: str, arguments, progress) -> list[dict]:
    """The answer to each segment that is not silent: `[{"start", "end", "text"}, ...]`, in seconds."""
    is_transcript = arguments.task == "transcribe"
    if is_transcript:
        parts = speech_segments(waveform, SAMPLING_RATE, target_seconds=TARGET_SECONDS)
        segments = [((part.start, part.end), (part.speech_start, part.speech_end)) for part in parts]
    else:  # of all that is there, in as few pieces as the encoder allows
        parts = split_at_pauses(waveform, SAMPLING_RATE, target_seconds=30.0)
        segments = [(part, part) for part in parts if not is_silent(waveform[slice(*part)])]
    progress.reset(total=len(segments))
    chunks = []
    for first in range(0, len(segments), arguments.batch_size):
        batch = segments[first : first + arguments.batch_size]
        waveforms = [waveform[slice(*part)] for part, _ in batch]
        texts = model(waveforms, [prompt] * len(batch), is_transcript)
        for (_, (start, end)), text in zip(batch, texts, strict=True):
            times = {"start": round(start / SAMPLING_RATE, 2), "end": round(end / SAMPLING_RATE, 2)}
            chunks.append(times | {"text": " ".join(text.split())})
        progress.update(len(batch))
    return [chunk for chunk in chunks if chunk["text"]]


def as_srt(chunks: list[dict]) -> str:
    """SubRip: a number, the times, the text, an empty line."""
    times = [f"{srt_time(chunk['start'])} --> {srt_time(chunk['end'])}" for chunk in chunks]
    return "\n".join(f"{row + 1}\n{time}\n{chunks[row]['text']}\n" for row, time in enumerate(times))


def srt_time(seconds: float) -> str:
    minutes, milliseconds = divmod(round(seconds * 1000), 60_000)
    return f"{minutes // 60:02}:{minutes % 60:02}:{milliseconds // 1000:02},{milliseconds % 1000:03}"


def as_plain(chunks: list[dict], task: str) -> str:
    """The transcript in one line; of captions and answers a line each, with its times where there are several."""
    if task == "transcribe" or len(chunks) <= 1:
        return " ".join(chunk["text"] for chunk in chunks) + "\n"
    return "".join(f"[{chunk['start']:.1f}-{chunk['end']:.1f} s] {chunk['text']}\n" for chunk in chunks)


def as_text(file: str, chunks: list[dict], arguments) -> str:
    """A file's answer in the form that was asked for."""
    if arguments.format == "srt":
        return as_srt(chunks)
    if arguments.format == "json":
        question = {"question": arguments.question} if arguments.task == "ask" else {}
        text = " ".join(chunk["text"] for chunk in chunks)
        # Escapes of JSON's own, where the terminal would get Python's.
        ascii_only = arguments.output_dir is None and "utf" not in (sys.stdout.encoding or "utf").lower()
        return json.dumps({"file": file, **question, "text": text, "chunks": chunks}, ensure_ascii=ascii_only) + "\n"
    named = len(arguments.files) > 1 and arguments.output_dir is None
    return (f"{file}: " if named else "") + as_plain(chunks, arguments.task)


def run(arguments: argparse.Namespace) -> int:
    # Before the model is loaded: a wrong path should not cost that wait.
    missing = [file for file in arguments.files if "://" not in file and not Path(file).is_file()]
    for file in missing:
        fault = "is a directory; name the files in it" if Path(file).is_dir() else "there is no such file"
        print(f"error: {file}: {fault}", file=sys.stderr)
    if len(missing) == len(arguments.files):
        return 2
    if arguments.output_dir is not None:
        try:
            arguments.output_dir.mkdir(parents=True, exist_ok=True)
            with TemporaryFile(dir=arguments.output_dir):
                pass
        except OSError as error:
            print(f"error: {arguments.output_dir}: cannot be written to ({error.strerror or error})", file=sys.stderr)
            return 2

    from .inference import Answerer

    name = arguments.model or default_model()
    try:
        model = Answerer(name, arguments.dtype, arguments.device, max_new_tokens=448)
    except (OSError, ValueError) as error:
        print(f"error: {name}: {' '.join(str(error).split())}", file=sys.stderr)
        if name == HUB_NAME:
            print(f"error: {HOW_TO_GET}", file=sys.stderr)
        return 2
    prompts = {"transcribe": model.processor.transcription_prompt, "caption": TEST_PROMPTS["audiocaption"]}
    prompt = arguments.question if arguments.task == "ask" else prompts[arguments.task]
    failed = len(missing)
    with tqdm(unit="segment", disable=not sys.stderr.isatty()) as progress:
        for file in arguments.files:
            if file in missing:
                continue
            progress.set_description(Path(file).name)
            try:
                waveform = load_audio(file)
            except (AudioError, OSError) as error:
                progress.write(f"error: {file}: {' '.join(str(error).split())}", file=sys.stderr)
                failed += 1
                continue
            text = as_text(file, answer_file(model, waveform, prompt, arguments, progress), arguments)
            if arguments.output_dir is None:
                progress.write(text, file=sys.stdout, end="")
                sys.stdout.flush()
            else:
                output = arguments.output_dir / output_name(file, arguments.format)
                try:
                    write_atomically(output, text)
                except OSError as error:
                    progress.write(f"error: {output}: cannot be written ({error.strerror or error})", file=sys.stderr)
                    failed += 1
    return 2 if failed == len(arguments.files) else min(failed, 1)


@command
def main(argv: list[str] | None = None) -> int:
    try:
        return run(parse_arguments(argv))
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
