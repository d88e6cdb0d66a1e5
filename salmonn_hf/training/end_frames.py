"""The end frames of a projector that is Whisper's whole decoder: learnt before training, from Whisper itself."""

import logging

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from ..data.clip_dataset import ClipDataset
from ..data.encoder_features import pad_features
from ..model.answering import transcript_limit
from ..model.speech_decoder import attention_bias
from .initialization import standardise

logger = logging.getLogger(__name__)

FIT_CLIPS, FIT_STEPS, FIT_BATCH, FIT_LEARNING_RATE = 400, 250, 16, 0.05
SILENCE = 2.0  # log-mel frames are clamped so far below their maximum, see WhisperFeatureExtractor
MAX_FRAMES = 3000  # 30 s
PADDING = 500  # log-mel frames, 5 s: as good as 30 s, and a fifth of the time


@torch.no_grad()
def padded_transcript(model, features: torch.Tensor) -> tuple[torch.LongTensor, torch.Tensor]:
    """
    Whisper's own transcript of a clip `(1, mel bins, mel frames)` with silence behind it, as in its training: token
    ids and states, see [`SalmonnWhisperDecoder.transcribe`].
    """
    projector = model.projector
    limit = transcript_limit(0.01 * features.shape[-1])
    features = nn.functional.pad(features, (0, PADDING), value=float(features.max()) - SILENCE)
    frames = model.encode_speech(features[..., :MAX_FRAMES])
    decoder, config = projector.decoder, projector.config
    frames, mask = frames["audio_frames"].to(decoder.layer_norm.weight.dtype), frames["audio_frames_mask"]
    (ids,), (states,) = decoder.transcribe(frames, mask, config, projector.banned, [limit])
    return ids, states


def transcript_loss(projector, frames: list[torch.Tensor], transcripts: list[torch.LongTensor]) -> torch.Tensor:
    """Next-token loss of Whisper's decoder over frames of clips' own length, in nats per token."""
    decoder, prompt = projector.decoder, torch.tensor(projector.config.prompt_ids)
    mask = pad_sequence([torch.ones(len(clip), dtype=torch.bool) for clip in frames], batch_first=True)
    frames, mask = projector.with_end(pad_sequence(frames, batch_first=True), mask)
    rows = pad_sequence([torch.cat([prompt, ids[:-1]]) for ids in transcripts], batch_first=True)
    labels = pad_sequence(transcripts, batch_first=True, padding_value=-100)
    states = decoder(rows, frames, attention_bias(mask, frames.dtype)[:, None, None])[:, len(prompt) - 1 :]
    scores = decoder.token_scores(states[labels != -100])
    return nn.functional.cross_entropy(scores.float(), labels[labels != -100])


def fit_end_frames(model, dataset: ClipDataset, seed: int = 0) -> float:
    """
    Train `end_frames` of the projector of `model`, so that Whisper's decoder writes over a clip's own length what it
    writes where silence follows. The texts of `dataset` have no part in it. And start its `state_norm` so that every
    feature of Whisper's states has mean 0 and variance 1. Returns the last loss, in nats per token.
    """
    projector, generator = model.projector, torch.Generator().manual_seed(seed)
    dtype = projector.decoder.layer_norm.weight.dtype
    examples, states = [], []
    for index in torch.randperm(len(dataset), generator=generator).tolist():
        clip = dataset[index].get("clip")
        if clip is not None and "input_features" in clip:
            features = clip["input_features"][None]
            inputs = pad_features([clip], model.device)
            with torch.no_grad():
                frames = model.encode_speech(**inputs)["audio_frames"][0].to(dtype)
            transcript, of_tokens = padded_transcript(model, features)
            # Else it repeats itself, or has no words.
            if len(transcript) > 1 and transcript[-1] == projector.config.end_id:
                examples.append((frames, transcript))
                states.append(of_tokens.float())
        if len(examples) == FIT_CLIPS:
            break
    standardise(projector.state_norm, torch.cat(states))
    ends = torch.cat([frames[-1:] for frames, _ in examples]).float()
    with torch.no_grad():  # from what stands there anyway: silence
        projector.end_frames.copy_(ends[: len(projector.end_frames)])
    end_frames = projector.end_frames.data
    projector.end_frames = nn.Parameter(end_frames.float())
    optimizer = torch.optim.AdamW([projector.end_frames], lr=FIT_LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, FIT_LEARNING_RATE, FIT_STEPS, pct_start=0.1, cycle_momentum=False
    )
    for step in range(FIT_STEPS):
        chosen = torch.randint(len(examples), (FIT_BATCH,), generator=generator).tolist()
        loss = transcript_loss(projector, *zip(*(examples[place] for place in chosen), strict=True))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_([projector.end_frames], 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == FIT_STEPS - 1:
            logger.info("end frames: step %d, %.3f nats per token", step, loss.item())
    projector.end_frames = nn.Parameter(projector.end_frames.data.to(end_frames.dtype), requires_grad=False)
    return loss.item()
