"""Tasks and prompts: complete, reproducible draws, messages for the processor, bad input."""

import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import noise, tiny_processor

from salmonn_hf.data.task_prompts import SYSTEM_PROMPT, TEST_PROMPTS, TRAIN_PROMPTS, draw_prompt, messages

# SALMONN's prompts/train_prompt.json and prompts/test_prompt.json.
TRAIN_TASKS = """
    asr asr_zh asr_de translation_ec audiocaption audiocaption_v2 QA inference_QA gender_QA gender_recognition
    phone_recognition speech_separation emotion_recognition music_description speaker_verification audio_story_telling
    speaker_diarization_asr
""".split()
TEST_TASKS = """
    asr asr_zh asr_de translation_ec audiocaption audiocaption_v2 QA gender_QA phone_recognition speech_query
    emotion_recognition lyrics_recognition audio_speech_description speaker_verification fluent_speech_audio
    speech_separation audio_story_telling speech_audio_query slot_filling music_description translation_en2ja
    translation_en2de speech_audio_coreasoning keywords speaker_diarization_asr
""".split()
ASKING_TASKS = {"QA", "inference_QA", "gender_QA", "slot_filling"}


def test_every_task_of_salmonn_has_prompts():
    assert len(TRAIN_TASKS) == 17 and len(TEST_TASKS) == 25
    assert list(TRAIN_PROMPTS) == TRAIN_TASKS and list(TEST_PROMPTS) == TEST_TASKS
    for task, prompts in TRAIN_PROMPTS.items():
        assert len(prompts) >= 4 and len(set(prompts)) == len(prompts), task


def test_a_question_has_one_place_in_the_tasks_that_take_one():
    banks = [*TRAIN_PROMPTS.items(), *((task, [prompt]) for task, prompt in TEST_PROMPTS.items())]
    for task, prompts in banks:
        for prompt in prompts:
            assert prompt.count("{}") == (task in ASKING_TASKS), prompt


def test_prompts_are_plain_lines_and_test_prompts_were_trained():
    for prompt in [*sum(TRAIN_PROMPTS.values(), []), *TEST_PROMPTS.values(), SYSTEM_PROMPT]:
        assert prompt == prompt.strip() and "\n" not in prompt and "<" not in prompt
    for task in set(TRAIN_TASKS) & set(TEST_TASKS):
        assert TEST_PROMPTS[task] in TRAIN_PROMPTS[task]


def test_transcription_request_asks_a_trained_prompt():
    assert tiny_processor().transcription_prompt in TRAIN_PROMPTS["asr"]


def test_every_prompt_is_drawn_about_equally_often():
    draws = Counter(draw_prompt("asr", "", 3, 1, index) for index in range(8000))
    assert set(draws) == set(TRAIN_PROMPTS["asr"])
    expected = 8000 / len(draws)
    # Chi-squared of 7 degrees of freedom: over 30 once in 10 000 seeds.
    assert sum((count - expected) ** 2 / expected for count in draws.values()) < 30


def test_seed_epoch_and_index_each_change_the_draw():
    def draws(seed=0, epoch=0, offset=0):
        return [draw_prompt("asr", "", seed, epoch, offset + index) for index in range(100)]

    assert draws() == draws()
    assert draws() != draws(seed=1) and draws() != draws(epoch=1) and draws() != draws(offset=1)
    assert draws(seed=1, epoch=11) != draws(seed=11, epoch=1)


def test_draws_ignore_global_random_state_and_the_integer_type():
    expected = [draw_prompt("asr", "", 5, 2, index) for index in range(20)]
    np.random.seed(0)
    assert [draw_prompt("asr", "", np.int64(5), np.int32(2), np.int64(index)) for index in range(20)] == expected


@pytest.mark.parametrize("hash_seed", ["1", "2"])
def test_another_process_draws_the_same(hash_seed):
    source = Path(__file__).resolve().parents[2] / "salmonn_hf" / "data" / "task_prompts.py"
    # The file by itself: it needs nothing but the standard library.
    draw = f"__import__('runpy').run_path({str(source)!r})['draw_prompt']"
    script = f"draw = {draw}; print([draw('asr', '', 7, 4, index) for index in range(30)])"
    output = subprocess.run(
        [sys.executable, "-S", "-c", script], capture_output=True, check=True, env={"PYTHONHASHSEED": hash_seed}
    ).stdout
    assert output.decode().strip() == str([draw_prompt("asr", "", 7, 4, index) for index in range(30)])


def test_question_is_filled_in_as_it_is():
    question = "Is {x} or {} or {0} said?"
    for index in range(20):
        prompt = draw_prompt("QA", question, 0, 0, index)
        assert prompt.count(question) == 1 and prompt.replace(question, "{}") in TRAIN_PROMPTS["QA"]
    assert messages("slot_filling", "  destination ")[0]["content"][1]["text"].endswith("slot: destination")


def test_messages():
    clip = noise(0.2)
    (turn,) = messages("asr", audio=clip)
    assert turn["role"] == "user" and turn["content"][0]["audio"] is clip
    assert turn["content"][1] == {"type": "text", "text": "Transcribe the speech."}
    assert messages("asr") == tiny_processor().transcription_messages()
    drawn = messages("QA", "Who speaks?", draw=(1, 2, 3))[0]["content"][1]["text"]
    assert drawn == draw_prompt("QA", "Who speaks?", 1, 2, 3)
    # A task without a test prompt can be drawn.
    drawn = messages("gender_recognition", draw=(0, 0, 0))[0]["content"][1]["text"]
    assert drawn in TRAIN_PROMPTS["gender_recognition"]


@pytest.mark.parametrize("system_turn", [True, False])
def test_processor_renders_system_text_audio_and_prompt_in_this_order(system_turn):
    processor = tiny_processor()
    turns = messages("audiocaption", system=SYSTEM_PROMPT, system_turn=system_turn)
    assert [turn["role"] for turn in turns] == (["system", "user"] if system_turn else ["user"])
    text = processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    order = [text.index(part) for part in (SYSTEM_PROMPT, processor.audio_token, TEST_PROMPTS["audiocaption"])]
    assert order == sorted(order) and all(text.count(part) == 1 for part in (SYSTEM_PROMPT, processor.audio_token))


@pytest.mark.parametrize(
    "wrong, nearest", [("arc", "asr"), ("ASR", "asr"), ("qa", "QA"), ("audio_caption", "audiocaption"), (None, "")]
)
def test_unknown_task_names_the_nearest(wrong, nearest):
    with pytest.raises(ValueError, match=rf"{wrong!r}; did you mean '{nearest}.*audiocaption_v2"):
        draw_prompt(wrong, "", 0, 0, 0)
    with pytest.raises(ValueError, match=rf"no test task {wrong!r}; did you mean '{nearest}"):
        messages(wrong)


def test_tasks_of_the_other_set_are_refused():
    with pytest.raises(ValueError, match="no training task 'keywords'"):
        draw_prompt("keywords", "", 0, 0, 0)
    with pytest.raises(ValueError, match="no test task 'gender_recognition'"):
        messages("gender_recognition")


@pytest.mark.parametrize("question", ["", "  ", None])
def test_missing_question_is_refused(question):
    for task in ("QA", "gender_QA"):
        with pytest.raises(ValueError, match=f"{task!r} needs the sample's question"):
            draw_prompt(task, question, 0, 0, 0)
        with pytest.raises(ValueError, match=f"{task!r} needs the sample's question"):
            messages(task, question)


def test_question_that_nothing_asks_for_is_refused():
    with pytest.raises(ValueError, match="'asr' takes no question, but the sample has 'Who speaks"):
        draw_prompt("asr", "Who speaks?", 0, 0, 0)
    with pytest.raises(ValueError, match="'keywords' takes no question"):
        messages("keywords", "three")
