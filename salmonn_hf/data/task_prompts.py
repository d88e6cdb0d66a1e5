"""What a sample asks of its clip: SALMONN's tasks by name, each with prompts, as chat messages."""

import difflib
import hashlib

# The names are those of SALMONN's manifests (Tang et al., 2024; https://github.com/bytedance/SALMONN), so that these
# can be used as they are. `{}` is where the sample's own question goes.
TRAIN_PROMPTS: dict[str, list[str]] = {
    "asr": [
        "Transcribe the speech.",
        "Write out, word for word, what is said.",
        "Which words does the speaker say?",
        "Turn this recording into text.",
        "Type out the spoken words.",
        "I need a transcript of this clip.",
        "Take down what you hear being said.",
        "Spell out the speech as text, leaving nothing out.",
    ],
    "asr_zh": [
        "把这段录音转写成汉字。",
        "逐字写出说话人讲的话。",
        "录音里的人说了哪些话？",
        "请给出这段中文讲话的文字稿。",
        "把听到的普通话记成文字。",
    ],
    "asr_de": [
        "Transkribiere die Aufnahme.",
        "Schreib Wort für Wort auf, was gesagt wird.",
        "Welche Worte sind hier zu hören?",
        "Gib das Gesprochene als Text wieder.",
        "Ich brauche den Wortlaut dieser Aufnahme.",
    ],
    "translation_ec": [
        "Translate what is said into Chinese.",
        "What would the speaker have said in Chinese?",
        "Write the meaning of these English words in Chinese.",
        "I do not speak English: tell me in Chinese what is said.",
        "把说话人的英语译成中文。",
        "用中文写出这段英语的意思。",
    ],
    "audiocaption": [
        "Caption this clip.",
        "Which sounds are there, and what makes them?",
        "Sum up in a sentence what can be heard.",
        "Tell someone who cannot hear it what this recording sounds like.",
        "What is going on here, to judge by the sounds?",
        "Put the scene that you hear into words.",
    ],
    "audiocaption_v2": [
        "Note down everything that can be heard.",
        "Go through the recording and report each sound in it.",
        "Give a full account of the sounds in this clip.",
        "List in prose what reaches your ears.",
    ],
    "QA": [
        "{}",
        "Answer from what you hear: {}",
        "Here is a question about the recording. {}",
        "Listen, then reply to this: {}",
    ],
    "inference_QA": [
        "{}",
        "Reason from what you hear: {}",
        "The recording does not say it outright, but it can be inferred. {}",
        "Draw a conclusion from the clip: {}",
    ],
    "gender_QA": [
        "{}",
        "Going by the voice: {}",
        "Judge by how the speaker sounds. {}",
        "A question about whoever is talking: {}",
    ],
    "gender_recognition": [
        "Is this a man's or a woman's voice?",
        "Does the voice belong to a male or to a female speaker?",
        "Who is talking, a man or a woman?",
        "Name the speaker's gender.",
        "Going by the voice, which gender does the speaker have?",
    ],
    "phone_recognition": [
        "Transcribe the speech as phones.",
        "Which phonemes are pronounced, one after another?",
        "Spell the pronunciation phoneme by phoneme.",
        "Write down the sounds of the speech, not its letters.",
        "I need the phone sequence of this utterance.",
    ],
    "speech_separation": [
        "Two voices overlap. Write out what the first says, then the second.",
        "Pull the talkers apart and transcribe each of them.",
        "Several people talk at once: what does each one say?",
        "Give a separate transcript for every voice in the mixture.",
    ],
    "emotion_recognition": [
        "Which emotion is in the voice? Answer with a single word.",
        "How does the speaker feel? Give one word.",
        "Name the mood of the speaker in just one word.",
        "One word only: what feeling does the voice express?",
    ],
    "music_description": [
        "What kind of music is this?",
        "Describe the piece: instruments, tempo, mood and style.",
        "Tell me what this music sounds like.",
        "How would you introduce this piece to a listener?",
    ],
    "speaker_verification": [
        "Is it one and the same voice from start to end? Say yes or no.",
        "Does a single person do all of the talking? Yes or no?",
        "Do both utterances come from the same speaker? Reply with yes or no.",
        "The first voice and the last: the same person? Yes or no.",
    ],
    "audio_story_telling": [
        "Tell a long story in which all that you hear takes place.",
        "Make up a detailed tale around these sounds.",
        "Let this recording inspire a story; work every sound of it in.",
        "Imagine what led to these sounds and narrate it at length.",
    ],
    "speaker_diarization_asr": [
        "Who says what? Transcribe turn by turn and name the speaker of each.",
        "Write the conversation down as a script, one line per turn.",
        "Transcribe with speaker labels, in the order of the turns.",
        "Mark each change of speaker and write what each one says.",
    ],
}

TEST_PROMPTS: dict[str, str] = {
    "asr": "Transcribe the speech.",
    "asr_zh": "把这段录音转写成汉字。",
    "asr_de": "Transkribiere die Aufnahme.",
    "translation_ec": "Translate what is said into Chinese.",
    "audiocaption": "Sum up in a sentence what can be heard.",
    "audiocaption_v2": "Note down everything that can be heard.",
    "QA": "{}",
    "gender_QA": "{}",
    "phone_recognition": "Transcribe the speech as phones.",
    "speech_query": "The speaker asks something. Give a thorough answer.",
    "emotion_recognition": "Which emotion is in the voice? Answer with a single word.",
    "lyrics_recognition": "Transcribe the lyrics that are sung.",
    "audio_speech_description": "Report both what is said and which sounds are behind it.",
    "speaker_verification": "Is it one and the same voice from start to end? Say yes or no.",
    "fluent_speech_audio": "Tell in a single flowing sentence what is said and which sounds go with it.",
    "speech_separation": "Pull the talkers apart and transcribe each of them.",
    "audio_story_telling": "Tell a long story in which all that you hear takes place.",
    "speech_audio_query": "The speaker asks about the sounds behind the voice. Give a thorough answer.",
    "slot_filling": "Listen to the request and fill in this slot: {}",
    "music_description": "Describe the piece: instruments, tempo, mood and style.",
    "translation_en2ja": "Translate what is said into Japanese.",
    "translation_en2de": "Translate what is said into German.",
    "speech_audio_coreasoning": "Reason from the sounds behind the voice to an answer to what the speaker asks.",
    "keywords": "Which three keywords sum up what is said?",
    "speaker_diarization_asr": "Transcribe with speaker labels, in the order of the turns.",
}

# Of which answers are captions, as CIDEr-D measures them, or short enough that one is right or wrong.
CAPTION_TASKS = ("audiocaption", "audiocaption_v2", "music_description")
QUESTION_TASKS = ("QA", "gender_QA", "emotion_recognition", "speaker_verification")

SYSTEM_PROMPT = (
    "You are given a recording and a request about it. Words that sound alike are told apart by their context: write "
    "the one that makes sense in the sentence. A transcript holds the spoken words and nothing else. A caption says "
    "which sounds are heard, what makes them and where; it mentions that someone talks, but does not quote what is "
    "said. Say each thing once: a word or phrase comes twice only where it is heard twice. Stop when the request is "
    "met."
)


def draw_prompt(task: str, question: str, seed: int, epoch: int, index: int) -> str:
    """
    The prompt of a training sample in an epoch: one of its task's, with its question filled in.

    It depends on the arguments alone, through SHA-256: every process, and a run that is resumed, draws the same.

    Args:
        task (`str`): a key of `TRAIN_PROMPTS`.
        question (`str`): the sample's own (`Q` in a SALMONN manifest); `""` for a task that takes none.
        seed, epoch, index (`int`): of the run, of the pass over the data, and of the sample in the data.

    Raises:
        ValueError: for a task that is not trained, naming the nearest one; for one that takes a question and got
            none, or the reverse.
    """
    prompts = _look_up(task, TRAIN_PROMPTS, "training")
    digest = hashlib.sha256(f"{seed} {epoch} {index}".encode()).digest()
    return _fill(task, prompts[int.from_bytes(digest[:8], "big") % len(prompts)], question)


def messages(
    task: str,
    question: str = "",
    audio=None,
    system: str | None = None,
    draw: tuple[int, int, int] | None = None,
    system_turn: bool = True,
) -> list[dict]:
    """
    The turns that put a task to the model about one clip, for `SalmonnProcessor.apply_chat_template`.

    Args:
        task, question (`str`): as in `draw_prompt`.
        audio (*optional*): the clip, as `salmonn_hf.audio.load_audio` takes it; without it only its place is held.
        system (`str`, *optional*): a system text, such as `SYSTEM_PROMPT`.
        draw (`tuple[int, int, int]`, *optional*): seed, epoch and index of a training sample, for one of its task's
            training prompts. Without it the prompt is the task's test prompt.
        system_turn (`bool`): whether `system` is a turn of its own, or begins the user's turn: the chat templates of
            some language models, Gemma 2's among them, know no system turn.

    Raises:
        ValueError: as `draw_prompt`; without `draw`, for a task that has no test prompt.
    """
    if draw is None:
        prompt = _fill(task, _look_up(task, TEST_PROMPTS, "test"), question)
    else:
        prompt = draw_prompt(task, question, *draw)
    clip = {"type": "audio"} if audio is None else {"type": "audio", "audio": audio}
    content = [clip, {"type": "text", "text": prompt}]
    if system is None:
        return [{"role": "user", "content": content}]
    if not system_turn:
        return [{"role": "user", "content": [{"type": "text", "text": system + "\n\n"}, *content]}]
    return [
        {"role": "system", "content": [{"type": "text", "text": system}]},
        {"role": "user", "content": content},
    ]


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
        raise ValueError(
            f"There is no {kind} task {task!r}; did you mean {nearest!r}? The {kind} tasks are {', '.join(prompts)}."
        )
    return prompts[task]


def _fill(task: str, prompt: str, question: str) -> str:
    question = (question or "").strip()
    if "{}" in prompt and not question:
        raise ValueError(f"The task {task!r} needs the sample's question; give it (Q in a manifest).")
    if question and "{}" not in prompt:
        raise ValueError(
            f"The task {task!r} takes no question, but the sample has {question!r}; leave it empty, or make the task "
            '"QA".'
        )
    return prompt.replace("{}", question)
