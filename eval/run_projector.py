"""
Transcribe a Parquet file with the whole model and with its projector alone, which the language model reads, and
print both word error rates, and the difference with its 95 % interval by paired bootstrap.

    python eval/run_projector.py --model model_cards/salmonn-lite-nano --data test.parquet

A projector's own transcript is that of Whisper's decoder, or of its CTC head. With `--without_states` the language
model also reads the text alone, without the projection of the decoder's states. Clips of up to 30 s.
"""

from types import SimpleNamespace

import numpy as np
import torch

from salmonn_hf.evaluation.bootstrap import interval, resampled_sums
from salmonn_hf.evaluation.clips import parquet_clips
from salmonn_hf.evaluation.command_line import model_parser
from salmonn_hf.evaluation.word_error_rate import error_counts
from salmonn_hf.inference import Answerer
from salmonn_hf.model.answering import generate_answers, transcript_limit
from salmonn_hf.model.audio import SAMPLING_RATE
from salmonn_hf.terminal import command

GREEDY = {"do_sample": False, "num_beams": 1, "is_transcript": True}


@torch.no_grad()
def transcribe(answerer: Answerer, waveforms: list[np.ndarray], without_states: bool) -> dict[str, list[str]]:
    """The transcripts of a batch in each way, by its name."""
    model, processor = answerer.model, answerer.processor
    inputs = dict(processor.apply_transcription_request(waveforms).to(model.device))
    clips = {name: inputs.pop(name) for name in list(inputs) if name.startswith("input_") and name != "input_ids"}
    frames = model.encode_audio(**clips)
    audio, embedding = model.project_audio(**frames), model.get_input_embeddings()
    read = audio.draft_ids
    if read is None:
        read = model.projector.ctc_transcripts(audio.states, audio.num_states, embedding)
    limits = [transcript_limit(len(waveform) / SAMPLING_RATE) for waveform in waveforms]
    texts = {
        "projector": [text.strip() for text in processor.batch_decode(read, skip_special_tokens=True)],
        "whole model": generate_answers(model, processor, inputs | frames, limits, **GREEDY),
    }
    if without_states:
        kept = frames | {"transcript_states": torch.zeros_like(frames["transcript_states"])}
        texts["without states"] = generate_answers(model, processor, inputs | kept, limits, **GREEDY)
    return texts


def compare(counts: dict[str, np.ndarray]) -> dict[str, SimpleNamespace]:
    """Of each way its word error rate, its errors, and the interval of its difference from the projector's rate."""
    results = {}
    for way, errors in counts.items():
        words = errors[:, [0, 1, 3]].sum(1)  # substitutions, deletions, hits
        of_clips = np.stack([errors[:, :3].sum(1), counts["projector"][:, :3].sum(1), words], axis=1)
        sums = resampled_sums(of_clips)
        low, high = interval((sums[:, 0] - sums[:, 1]) / sums[:, 2])
        total = of_clips.sum(0)
        results[way] = SimpleNamespace(wer=total[0] / total[2], errors=int(total[0]), low=low, high=high)
    return results


@command
def main() -> None:
    parser = model_parser(__doc__)
    parser.add_argument("--text_column", default="text", help="default: %(default)s")
    parser.add_argument("--batch_size", type=int, default=16, help="default: %(default)s")
    parser.add_argument("--without_states", action="store_true", help="also without the decoder's states")
    arguments = parser.parse_args()
    answerer = Answerer(arguments.model, arguments.dtype, arguments.device)
    clips = parquet_clips(arguments.data, arguments.text_column)[: arguments.max_clips]
    clips = sorted(clips, key=lambda clip: clip.header_seconds())
    texts: dict[str, list[str]] = {}
    for start in range(0, len(clips), arguments.batch_size):
        waveforms = [clip.waveform() for clip in clips[start : start + arguments.batch_size]]
        for way, said in transcribe(answerer, waveforms, arguments.without_states).items():
            texts.setdefault(way, []).extend(said)
    references = [clip.references[0] for clip in clips]
    counts = {way: error_counts(references, hypotheses) for way, hypotheses in texts.items()}
    for way, result in compare(counts).items():
        print(
            f"{way}: WER {result.wer:.2%}, {result.errors} errors; against the projector "
            f"{100 * result.low:+.2f} to {100 * result.high:+.2f} points (95 %)"
        )


if __name__ == "__main__":
    main()
