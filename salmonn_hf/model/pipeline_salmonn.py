"""The "automatic-speech-recognition" pipeline of SALMONN: audio of any kind and any length to text."""

from collections.abc import Iterable, Iterator, Sized
from itertools import islice
from numbers import Real

from transformers import AutomaticSpeechRecognitionPipeline, GenerationConfig, pipeline
from transformers.models.whisper.tokenization_whisper import LANGUAGES, TO_LANGUAGE_CODE
from transformers.pipelines import PIPELINE_REGISTRY

from .answering import generate_answers, transcript_limit
from .audio import load_audio
from .processing_salmonn import SalmonnProcessor
from .segmentation import TARGET_SECONDS, speech_segments

TASK = "automatic-speech-recognition"
# Options of transformers' own pipeline.
OF_OTHER_MODELS = {
    "stride_length_s": "segments are cut at pauses, and do not overlap",
    "return_language": "the model does not say which language it hears",
}


class SalmonnAutomaticSpeechRecognitionPipeline(AutomaticSpeechRecognitionPipeline):
    r"""
    Transcribes audio with [`SalmonnForConditionalGeneration`].

    Audio is cut at pauses into segments no longer than the encoder's input, and each is transcribed on its own,
    without the silence at its edges, `batch_size` at a time, from one file or several. Silence has no text, and
    neither has a segment in which a trained CTC head finds no word.
    Inputs and results are streamed: no more than the features of one batch are in memory.

    ```python
    >>> transcriber = pipeline("automatic-speech-recognition", model="path/to/checkpoint")
    >>> transcriber("interview.mp3", return_timestamps=True)
    {'text': ..., 'chunks': [{'text': ..., 'timestamp': (0.0, 9.31)}, ...]}
    ```

    Args:
        model ([`SalmonnForConditionalGeneration`]).
        processor ([`SalmonnProcessor`], *optional*): default: one with the settings saved beside the model, around
            `tokenizer` and `feature_extractor`.
        device, dtype, batch_size and generation parameters: as in any pipeline.
    """

    # All optional: a processor alone is enough, and so are a tokenizer and a feature extractor.
    _load_processor = None
    _load_tokenizer = None
    _load_feature_extractor = None
    # Greedy. Where nobody says how many tokens, each segment may have its share of them, see `transcript_limit`.
    _default_generation_config = GenerationConfig(max_new_tokens=448)

    def __init__(self, model, processor=None, tokenizer=None, feature_extractor=None, **kwargs):
        if processor is None:
            processor = processor_from_parts(model, tokenizer, feature_extractor)
        parts = {"tokenizer": processor.tokenizer, "feature_extractor": processor.feature_extractor}
        super().__init__(model, processor=processor, **parts, **kwargs)
        self.type = "seq2seq"

    def __call__(self, inputs, **kwargs):
        r"""
        Transcribe one input or many.

        Args:
            inputs: what [`load_audio`] takes (path, URL, bytes, array at the model's sampling rate, dict with an array
                and its rate, ...), or a list, generator or dataset of these. A dataset's column is
                `transformers.pipelines.pt_utils.KeyDataset(dataset, "audio")`.
            return_timestamps (`bool`, *optional*): add "chunks", the text and time of each segment.
            prompt (`str`, *optional*): ask this instead of the prompt that the processor was saved with.
            language (`str`, *optional*): the language to write, e.g. "English".
            batch_size (`int`, *optional*): segments that the model transcribes at once. It changes the speed alone.
            chunk_length_s (`float`, *optional*): the longest segment. Default: as long as the encoder's input, 30 s.
            target_length_s (`float`, *optional*): cut at any pause rather than make a segment longer than this.
            speculation_type (`str`, *optional*): "ctc", or "transcript" with a projector that is Whisper's whole
                decoder, transcribes a clip in fewer passes of the language model, which verifies the projector's
                draft; the text is the same. With batches of one, the default.
            generate_kwargs (`dict`, *optional*): for `model.generate`; they may also be given one by one.

        Returns:
            `dict` with "text" and, if asked for, "chunks": `[{"text": str, "timestamp": (start, end)}, ...]` in
            seconds. A list of them for a list, an iterator for a generator or dataset.

        Raises:
            AudioError: for an input that cannot be used, naming it.
            ValueError: for a language that the model was not trained to write; for word-level timestamps, overlapping
                segments (`stride_length_s`), the language (`return_language`), a `chunk_length_s` above what is heard
                at once, and lengths that are no seconds.
        """
        if isinstance(inputs, list) and len(inputs) == 0:
            return []
        # From its tenth call on the base class advises against single inputs on a GPU; one input may be hours here.
        self.call_count = 0
        return super().__call__(inputs, **kwargs)

    def _sanitize_parameters(
        self,
        return_timestamps=None,
        prompt=None,
        language=None,
        chunk_length_s=None,
        target_length_s=None,
        generate_kwargs=None,
        **more_generate_kwargs,
    ):
        if return_timestamps not in (None, False, True):
            raise ValueError(
                f"return_timestamps={return_timestamps!r}: SALMONN gives times of segments only; use True or False."
            )
        longest = self.feature_extractor.chunk_length
        for name, seconds in (("chunk_length_s", chunk_length_s), ("target_length_s", target_length_s)):
            if seconds is not None and not (isinstance(seconds, Real) and seconds >= 0):
                raise ValueError(f"{name}={seconds!r} must be a number of seconds, 0 or more.")
        if chunk_length_s is not None and chunk_length_s > longest:
            raise ValueError(f"chunk_length_s={chunk_length_s} must be in 0 to {longest}: no more is heard at once.")
        generate_kwargs = {**(generate_kwargs or {}), **more_generate_kwargs}
        for name, reason in OF_OTHER_MODELS.items():
            if generate_kwargs.pop(name, None):
                raise ValueError(f"{name} has no use here: {reason}. Leave it out.")
        if language is not None or generate_kwargs.get("language"):
            check_language(language or generate_kwargs["language"], self.model.config.languages)
        preprocess = {"chunk_length_s": chunk_length_s, "target_length_s": target_length_s}
        forward = {"prompt": prompt, "language": language, **generate_kwargs}
        steps = (preprocess, forward, {"return_timestamps": return_timestamps})
        return tuple({key: value for key, value in step.items() if value is not None} for step in steps)

    def preprocess(self, inputs, chunk_length_s=None, target_length_s=TARGET_SECONDS) -> Iterator[dict]:
        """The segments of one input, as waveforms; features are made of them batch by batch."""
        sampling_rate = self.feature_extractor.sampling_rate
        waveform = load_audio(inputs, sampling_rate)
        max_seconds = chunk_length_s or self.feature_extractor.chunk_length
        segments = speech_segments(waveform, sampling_rate, max_seconds, target_length_s)
        for segment in segments:
            yield {
                "waveform": waveform[segment.start : segment.end],
                "timestamp": (segment.speech_start / sampling_rate, segment.speech_end / sampling_rate),
                "is_last": segment is segments[-1],
            }
        if not segments:
            yield {"waveform": None, "timestamp": None, "is_last": True}

    def _forward(self, model_inputs, prompt=None, language=None, **generate_kwargs) -> dict:
        segments = model_inputs["segments"]
        waveforms = [segment.pop("waveform") for segment in segments]
        spoken = [waveform for waveform in waveforms if waveform is not None]
        texts = iter(self._transcribe(spoken, prompt, language, generate_kwargs) if spoken else [])
        return {
            "segments": [
                segment | {"text": "" if waveform is None else next(texts)}
                for segment, waveform in zip(segments, waveforms, strict=True)
            ]
        }

    def _transcribe(self, waveforms, prompt, language, generate_kwargs) -> list[str]:
        inputs = self.processor.apply_transcription_request(waveforms, prompt=prompt, language=language)
        settings = self._prepare_generate_kwargs(generate_kwargs)
        limits = settings.pop("max_new_tokens", None)
        if limits is not None and "max_new_tokens" not in self._generate_kwargs | generate_kwargs:
            rate = self.feature_extractor.sampling_rate
            limits = [transcript_limit(len(waveform) / rate) for waveform in waveforms]
        settings["is_transcript"] = prompt is None  # another prompt may ask for anything
        return generate_answers(self.model, self.processor, inputs, limits, **settings)

    def postprocess(self, model_outputs, return_timestamps=False) -> dict:
        # One space between words, whatever the segments begin and end with.
        texts = ((" ".join(segment["text"].split()), segment["timestamp"]) for segment in model_outputs)
        chunks = [{"text": text, "timestamp": timestamp} for text, timestamp in texts if text]
        result = {"text": " ".join(chunk["text"] for chunk in chunks)}
        if return_timestamps:
            result["chunks"] = chunks
        return result

    def get_iterator(self, inputs, num_workers, batch_size, *parameters) -> "TranscriptIterator":
        """
        Batches of waveforms, of which the processor makes one padded input; the base class's data loader would pad
        tensors without knowing what they are. `num_workers` has no use here.
        """
        return TranscriptIterator(self, inputs, batch_size, *parameters)

    def save_pretrained(self, save_directory, **kwargs):
        """Save the model and its processor, from which `pipeline` makes this pipeline again."""
        self.model.save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory, **kwargs)


def check_language(language: str, trained: list[str] | None):
    """
    Raises:
        ValueError: for a language, by its name or code, that is not among the codes `trained`; `None` takes all.
    """
    code = TO_LANGUAGE_CODE.get(language.lower(), language.lower())
    if trained is not None and code not in trained:
        names = ", ".join(LANGUAGES.get(known, known).capitalize() for known in trained)
        raise ValueError(f"language={language!r}: the model was trained to write {names}. Leave it out, or name that.")


class TranscriptIterator:
    """Reads inputs as it goes, and gives one result per input, in order; its length is theirs."""

    def __init__(self, pipe, inputs: Iterable, batch_size: int, preprocess: dict, forward: dict, postprocess: dict):
        self.pipe, self.inputs, self.batch_size = pipe, inputs, batch_size
        self.preprocess, self.forward, self.postprocess = preprocess, forward, postprocess

    def __len__(self):
        return len(self.inputs)

    def __iter__(self):
        # A torch dataset has a length and items, but need not end by itself when iterated over.
        indexed = isinstance(self.inputs, Sized)
        sources = (self.inputs[i] for i in range(len(self.inputs))) if indexed else self.inputs
        segments = (segment for source in sources for segment in self.pipe.preprocess(source, **self.preprocess))
        transcribed = []
        while batch := list(islice(segments, self.batch_size)):
            for segment in self.pipe.forward({"segments": batch}, **self.forward)["segments"]:
                transcribed.append(segment)
                if segment["is_last"]:
                    yield self.pipe.postprocess(transcribed, **self.postprocess)
                    transcribed = []


def processor_from_parts(model, tokenizer, feature_extractor) -> SalmonnProcessor:
    """The processor that was saved beside `model`, or one that fits it, with this tokenizer and feature extractor."""
    if tokenizer is None or feature_extractor is None:
        raise ValueError(
            "The pipeline needs a processor=, or a tokenizer= and a feature_extractor=. If they should have come with "
            f"the checkpoint '{model.name_or_path}', AutoProcessor.from_pretrained on it says why they did not."
        )
    projector_config = model.config.projector_config
    windows = ("window_frames", "window_stride", "queries_per_window")
    settings = {name: getattr(projector_config, name) for name in windows}
    settings["audio_token"] = tokenizer.convert_ids_to_tokens(model.config.audio_token_id)
    if model.name_or_path:
        saved, _ = SalmonnProcessor.get_processor_dict(model.name_or_path)
        settings |= saved
    return SalmonnProcessor.from_args_and_dict([feature_extractor, tokenizer], settings)


class SpeechRecognitionPipelineForAnyModel(SalmonnAutomaticSpeechRecognitionPipeline):
    """Makes SALMONN's pipeline for a SALMONN model and transformers' own for any other."""

    def __new__(cls, model, processor=None, **kwargs):
        if model.config.model_type == "salmonn":
            return SalmonnAutomaticSpeechRecognitionPipeline(model, processor=processor, **kwargs)
        # Back through the factory, by whose rules the stock pipeline takes, and misses, its parts.
        return pipeline(model=model, pipeline_class=AutomaticSpeechRecognitionPipeline, **kwargs)


def register_pipeline():
    """Let `pipeline("automatic-speech-recognition")` know SALMONN. It stays the same for all other models."""
    PIPELINE_REGISTRY.supported_tasks[TASK]["impl"] = SpeechRecognitionPipelineForAnyModel


__all__ = ["SalmonnAutomaticSpeechRecognitionPipeline", "register_pipeline"]
