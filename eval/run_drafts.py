"""
Transcribe a Parquet file clip by clip, each by plain greedy decoding and with the projector's drafts, and print what
the drafts save: seconds a transcript, passes of the language model, and in how many clips the text is the same.

    python eval/run_drafts.py --model model_cards/salmonn-lite-nano --data test.parquet --output runs/drafts.json

The two take turns, for a machine that is slower at one time than at another to be so to both.
"""

import json
import time
from pathlib import Path

from salmonn_hf.evaluation.clips import parquet_clips
from salmonn_hf.evaluation.command_line import model_parser
from salmonn_hf.files import write_atomically
from salmonn_hf.inference import Transcriber
from salmonn_hf.terminal import command

WAYS = ("greedy", "drafts")


@command
def main() -> None:
    parser = model_parser(__doc__)
    parser.add_argument("--output", type=Path, help="JSON file of the result")
    parser.add_argument("--text_column", default="text", help="default: %(default)s")
    arguments = parser.parse_args()
    transcriber = Transcriber(arguments.model, arguments.dtype, arguments.device)
    clips = parquet_clips(arguments.data, arguments.text_column)[: arguments.max_clips]
    result = compare(transcriber, [clip.waveform() for clip in clips])
    result |= {"model": arguments.model, "device": transcriber.device, "dtype": transcriber.dtype}
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(arguments.output, json.dumps(result, indent=2) + "\n")
    seconds, passes = result["seconds"], result["passes"]
    print(
        f"{result['clips']} clips: {seconds['greedy']:.1f} s greedy, {seconds['drafts']:.1f} s with drafts "
        f"({seconds['drafts'] / seconds['greedy']:.3f} of it), {passes['greedy']} and {passes['drafts']} passes of "
        f"the language model, the same text {result['same_text']} times"
    )


def compare(transcriber: Transcriber, waveforms: list) -> dict:
    """Seconds and passes of the language model of both ways, and how often they give the same text."""
    counted = []
    hook = transcriber.model.language_model.register_forward_hook(lambda *_: counted.append(1))

    def transcribe(waveform, way: str) -> tuple[float, int, str]:
        counted.clear()
        transcriber.speculation_type = None if way == "greedy" else transcriber.model.projector.speculation_type
        start = time.perf_counter()
        (text,) = transcriber([waveform])
        return time.perf_counter() - start, len(counted), text

    for way in WAYS:  # to warm up
        transcribe(waveforms[0], way)
    rounds = [{way: transcribe(waveform, way) for way in WAYS} for waveform in waveforms]
    hook.remove()
    seconds, passes = ({way: sum(each[way][i] for each in rounds) for way in WAYS} for i in (0, 1))
    same_text = sum(each["greedy"][2] == each["drafts"][2] for each in rounds)
    return {"clips": len(rounds), "seconds": seconds, "passes": passes, "same_text": same_text}


if __name__ == "__main__":
    main()
