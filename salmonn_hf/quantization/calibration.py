"""Inputs to calibrate on: prompts with audio and answers, as the model sees them in use."""

import torch

from ..data import task_prompts
from ..data.clip_audio import read_clip
from ..data.clip_table import ClipTable
from ..data.sources import Source
from ..data.text_choice import row_texts


def draw_clips(sources: list[Source], count: int, seed: int) -> list[dict]:
    """`audio`, `messages` (`None`: a request for a transcript) and `text` of random clips, by the sources' weights."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.tensor([source.weight for source in sources])
    ends = (count * weights.cumsum(0) / weights.sum()).round().int()
    shares = ends.diff(prepend=torch.zeros(1, dtype=ends.dtype)).tolist()  # they sum to `count`
    drawn = []
    for source, share in zip(sources, shares, strict=True):
        table = ClipTable(source)
        for index in torch.randperm(len(table), generator=generator)[:share].tolist():
            row = table[index]
            task = source.task or row.get("task")
            drawn.append(
                {
                    "audio": read_clip(row, source.speed),
                    "messages": task_prompts.messages(task, row.get("question") or "") if task else None,
                    "text": source.choose_text(source.replaced(row_texts(row))),
                }
            )
    return drawn


def prompt_with_answer(processor, example: dict) -> dict:
    """The model's inputs for a clip of `draw_clips`: the prompt with its audio, and its text as answer."""
    messages = example["messages"] or processor.transcription_messages()
    clip = {"type": "audio", "audio": example["audio"]}
    messages = [
        message | {"content": [clip if part["type"] == "audio" else part for part in message["content"]]}
        for message in messages
    ]
    settings = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
    inputs = dict(processor.apply_chat_template(messages, **settings))
    answer = torch.tensor([processor.text_ids(example["text"].strip()) + [processor.tokenizer.eos_token_id]])
    inputs["input_ids"] = torch.cat([inputs["input_ids"], answer], dim=1)
    inputs["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones_like(answer)], dim=1)
    return inputs
