"""A stream of clips, which has no end, as the data of one run."""

import torch
from transformers import TrainerCallback

from ..data.streamed_clips import StreamedClips


class StreamedRun(torch.utils.data.IterableDataset):
    """
    A stream as the one epoch of a run of `length` clips, over all processes, so that `Trainer` counts its steps, and
    does not begin another epoch when a run that has ended is started again.
    """

    def __init__(self, stream: StreamedClips, length: int):
        self.stream, self.length = stream, length

    @property
    def clips(self):
        return self.stream.clips

    def __len__(self) -> int:
        return self.length

    def __iter__(self):
        return iter(self.stream)


class SkipTrainedClips(TrainerCallback):
    """
    Tells a stream how many clips a resumed run was trained on: `Trainer` asks for their batches and throws them away,
    so they need not be decoded. A worker process makes at least its share of them.
    """

    def __init__(self, stream: StreamedClips, clips_of_a_batch: int):
        self.stream, self.clips_of_a_batch = stream, clips_of_a_batch

    def on_train_begin(self, args, state, control, **kwargs):
        steps = 0 if args.ignore_data_skip else state.global_step
        batches = steps * args.gradient_accumulation_steps // max(args.dataloader_num_workers, 1)
        self.stream.skip_first = batches * self.clips_of_a_batch
