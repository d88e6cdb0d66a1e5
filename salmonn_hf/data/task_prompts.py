"""What a sample asks of its clip: SALMONN's tasks by name, each with prompts, as chat messages."""

import difflib
import hashlib
import json
from pathlib import Path

# Tasks have the names of SALMONN's manifests (Tang et al., 2024; https://github.com/bytedance/SALMONN), so that these
# can be used as they are. In a prompt, `{}` is where the sample's own question goes.
_PROMPTS = json.loads(Path(__file__).with_name("task_prompts.json").read_text(encoding="utf-8"))
TRAIN_PROMPTS: dict[str, list[str]] = _PROMPTS["training"]
TEST_PROMPTS: dict[str, str] = _PROMPTS["test"]
SYSTEM_PROMPT: str = _PROMPTS["system"]

# Of which answers are captions, as CIDEr-D measures them, or short enough that one is right or wrong.
CAPTION_TASKS = ("audiocaption", "audiocaption_v2", "music_description")
QUESTION_TASKS = ("QA", "gender_QA", "emotion_recognition", "speaker_verification")


def draw_prompt(task: str, question: str, seed: int, epoch: int, index: int) -> str:
    """
    The prompt of a training sample in an epoch: one of its task's, with its question filled in.

    It depends on the arguments alone, through SHA-256: every process, and a run that is resumed, draws the same.

    Args:
        task (`str`): a key of `TRAIN_PROMPTS`.
        question (`str`): the sample's own (`Q` in a SALMONN manifest); `""` for a task that takes none.
        seed, epoch, index (`int`): of the run, of the pass over the data, and of the sample in the data.

    Raises:
        ValueError: for a task that is not trained; for one that takes a question and got none, or the reverse.
    """
    prompts = _look_up(task, TRAIN_PROMPTS, "training")
    digest = hashlib.sha256(f"{seed} {epoch} {index}".encode()).digest()
    return _fill(task, prompts[int.from_bytes(digest[:8], "big") % len(prompts)], question)


def messages(
    task: str, question: str = "", audio=None, system: str | None = None, draw=None, system_turn: bool = True
) -> list[dict]:
    """
    The turns that put a task to the model about one clip, for `SalmonnProcessor.apply_chat_template`.

    Args:
        task, question (`str`): as in `draw_prompt`.
        audio (*optional*): the clip, as `salmonn_hf.audio.load_audio` takes it; without it only its place is held.
        system (`str`, *optional*): a system text, such as `SYSTEM_PROMPT`.
        draw (`tuple[int, int, int]`, *optional*): seed, epoch and index of `draw_prompt`, for a training prompt.
            Without it the prompt is the task's test prompt.
        system_turn (`bool`): whether `system` is a turn of its own, which Gemma 2's chat template, for one, does not
            know, or begins the user's turn.

    Raises:
        ValueError: as `draw_prompt`; without `draw`, for a task that has no test prompt.
    """
    if draw is None:
        prompt = _fill(task, _look_up(task, TEST_PROMPTS, "test"), question)
    else:
        prompt = draw_prompt(task, question, *draw)
    clip = {"type": "audio"} if audio is None else {"type": "audio", "audio": audio}
    content = [clip, {"type": "text", "text": prompt}]
    if system is not None and system_turn:
        instruction = {"role": "system", "content": [{"type": "text", "text": system}]}
        return [instruction, {"role": "user", "content": content}]
    if system is not None:
        content.insert(0, {"type": "text", "text": system + "\n\n"})
    return [{"role": "user", "content": content}]


def training_metric(task: str) -> str | None:
    """What a model is measured by on a task while it trains: "wer", "cider" or "accuracy"; `None`: by nothing."""
    if is_transcript(task):
        return "wer"
    if task in CAPTION_TASKS:
        return "cider"
    return "accuracy" if task in QUESTION_TASKS else None


def is_transcript(task: str) -> bool:
    """Whether the answer to a task is what is said, word for word: what the CTC head can spell."""
    return task.startswith("asr")


def _look_up(task: str, prompts: dict, kind: str):
    if task not in prompts:
        lower = {name.lower(): name for name in prompts}
        nearest = lower[difflib.get_close_matches(str(task).lower(), lower, n=1, cutoff=0.0)[0]]
        known = f"The {kind} tasks are {', '.join(prompts)}."
        raise ValueError(f"There is no {kind} task {task!r}; did you mean {nearest!r}? {known}")
    return prompts[task]


def _fill(task: str, prompt: str, question: str) -> str:
    question = (question or "").strip()
    if "{}" in prompt and not question:
        raise ValueError(f"The task {task!r} needs the sample's question; give it (Q in a manifest).")
    if question and "{}" not in prompt:
        remedy = 'leave it empty, or make the task "QA"'
        raise ValueError(f"The task {task!r} takes no question, but the sample has {question!r}; {remedy}.")
    return prompt.replace("{}", question)
