"""Decoding with drafts: the CTC head gives a transcript of the audio embeddings, the language model verifies it.

Speculative decoding (Leviathan et al., ICML 2023, https://arxiv.org/abs/2211.17192): one forward pass takes a whole
draft, and keeps the tokens up to the first that greedy decoding would not have chosen, and that one's replacement. The
text is that of greedy decoding, in fewer passes, of which the first takes the prompt as well. How a sentence ends is
hardly audible, so a pass also tries the other marks in the last one's place, as branches of the draft (as in
SpecInfer, Miao et al., ASPLOS 2024, https://arxiv.org/abs/2305.09781).
"""

import re
from itertools import pairwise

import torch
from torch import nn
from transformers.generation import GenerateDecoderOnlyOutput, SuppressTokensLogitsProcessor

from .respelling import WORD_STARTS

PASS_TOKENS = 24  # of a draft that one pass verifies; those behind the first wrong one cost time for nothing
END_MARKS = (".", "!", "?", "...")
REACH = 4  # tokens of a draft among which the language model's next one is looked for
# Of a transcript that begins with one, a question mark is likelier at the end than a full stop.
QUESTION_WORDS = set(
    "who what where when why how which whose is are am was were do does did can could will would shall should have "
    "has isn't aren't don't doesn't didn't can't couldn't won't wouldn't haven't hasn't".split()
)
# First words behind which the training texts have a comma in four of ten cases or more.
INTERJECTIONS = set("yes no yeah okay oh ah hey well gee look besides wow".split())


def words(text: str) -> list[str]:
    """The words of a text, without case and punctuation."""
    return re.findall(r"[\w']+", text.lower().replace("’", "'"))


def alignment_costs(said: list[str], draft: list[str]) -> list[float]:
    """
    Edit distance of the words `said` from each beginning of `draft`, of 0, 1, 2, ... words. The last word may be
    unfinished: the start of a draft's word costs half an error.
    """
    costs = [float(j) for j in range(len(draft) + 1)]
    for i, word in enumerate(said):
        above, costs = costs, [i + 1.0]
        for j, drafted in enumerate(draft):
            unfinished = i == len(said) - 1 and drafted.startswith(word)
            substitution = 0.0 if word == drafted else 0.5 if unfinished else 1.0
            costs.append(min(above[j] + substitution, above[j + 1] + 1, costs[j] + 1))
    return costs


def place_in_draft(said: list[str], draft: list[str]) -> tuple[int, float]:
    """How many words of `draft` the words `said` so far stand for, and their edit distance from these."""
    costs = alignment_costs(said, draft)
    return min(range(len(costs)), key=lambda j: (costs[j], -j)), min(costs)


def ends_sentence(text: str) -> bool:
    """Whether a capital follows: behind three dots a sentence goes on."""
    return text.endswith((".", "?", "!")) and not text.endswith("...")


def capitalized(text: str) -> str:
    return text[:1].upper() + text[1:]


def continuation(text: str, draft: list[str]) -> str | None:
    """
    The rest of a draft after the `text` that the language model has written, spelt as it would: capitals where a
    sentence begins, a full stop or a question mark at the end. `None` where the text has little to do with the draft.
    """
    said = words(text)
    place, distance = place_in_draft(said, draft)
    if distance > 2 + len(said) / 2:
        return None
    rest = ["I" + word[1:] if word == "i" or word.startswith("i'") else word for word in draft[place:]]
    if rest and (not text or ends_sentence(text.rstrip())):
        rest[0] = capitalized(rest[0])
    if not text and len(rest) > 1 and draft[0] in INTERJECTIONS:
        rest[0] += ","
    unfinished = place > 0 and text[-1:].isalnum() and draft[place - 1].startswith(said[-1])
    end_of_word = draft[place - 1][len(said[-1]) :] if unfinished else ""
    ends_with_word = bool(rest) or text[-1:].isalnum()
    mark = "?" if draft and draft[0] in QUESTION_WORDS else "."
    rest = end_of_word + "".join(f" {word}" for word in rest) + (mark if ends_with_word else "")
    return rest if text else rest.lstrip()


class CTCDraft:
    """
    What a pass of the language model verifies, for one prompt: first the CTC head's draft. Where that was wrong, it is
    revised by what the language model itself predicted behind that place, as in Jacobi decoding (Santilli et al., ACL
    2023, https://arxiv.org/abs/2305.10427): see `revise`.

    Args:
        draft_ids (`list[int]`): the CTC head's transcript, see `best_tokens`.
        tokenizer (`PreTrainedTokenizerBase`): the language model's.
        eos_token_id (`int`).
    """

    def __init__(self, draft_ids: list[int], tokenizer, eos_token_id: int):
        self.tokenizer, self.eos_token_id = tokenizer, eos_token_id
        self.draft = words(tokenizer.decode(draft_ids))
        self.candidates, self.revised, self.is_first = [], [], True

    def choose_candidates(self, written: list[int]) -> list[int]:
        """The tokens to verify behind those that the language model has written so far; none without a draft."""
        drafted = self.rest_of_draft(written)
        candidates = self.revised if self.revised and self.is_near(drafted) else drafted
        self.candidates = candidates[:PASS_TOKENS]
        return self.candidates

    def other_ends(self) -> list[int]:
        """Marks that the candidates might end with in place of theirs, where they end with one."""
        if self.candidates[-1:] != [self.eos_token_id] or len(self.candidates) < 2:
            return []
        end = self.candidates[-2]
        marks = [ids[0] for ids in map(self.token_ids, END_MARKS) if len(ids) == 1 and ids[0] != end]
        return marks if self.is_mark(end) else []

    def rest_of_draft(self, written: list[int]) -> list[int]:
        """What the CTC head's draft has behind the tokens that the language model has written."""
        text = self.tokenizer.decode(written, clean_up_tokenization_spaces=False)
        rest = continuation(text, self.draft) if self.draft else None
        return [] if rest is None else self.token_ids(rest) + [self.eos_token_id]

    def is_near(self, drafted: list[int]) -> bool:
        """Whether the revised candidates have most of the words that the draft has there, if it has any."""
        expected, revised = (words(self.tokenizer.decode(ids)) for ids in (drafted, self.revised))
        return alignment_costs(revised, expected)[-1] <= max(1, len(expected) / 2) or not drafted

    def update(self, predicted: list[int], matches: int):
        """Revise the rest of the candidates, of which `matches` were right, by what a pass predicted behind each."""
        self.revised = []
        if matches < len(self.candidates) and predicted[matches] != self.eos_token_id:
            self.revised = self.revise(predicted, matches)
        self.is_first = False

    def revise(self, predicted: list[int], matches: int) -> list[int]:
        """
        The candidates to verify next. `predicted[i]` is what the language model says in the place of candidate `i`:
        it follows the candidates before, so behind a wrong one it may be wrong as well, but not for long. A token
        that stands in the draft a little further on is taken to have left out what lies between; a mark, or a piece
        of a word, to stand before the candidate in whose place it comes; any other token to replace its word.
        """
        drafted, revised, place, sure = self.candidates, [], matches, True
        again = matches == 0 and not self.is_first  # what replaced the last candidate is no whole word yet
        while place < len(predicted) and revised[-1:] != [self.eos_token_id]:
            token, rest = predicted[place], drafted[place:]
            found = self.find(token, rest)
            if found is not None:
                revised += [token, *found[1]]
                place, sure = place + found[0], True
            elif not rest:
                revised.append(token)
                place += 1
            elif not sure:  # of two wrong tokens in a row the second is rather the draft's
                revised.append(rest[0])
                place, sure = place + 1, True
            elif self.stands_before(token, rest[0]) or (again and not revised):
                revised += [token, *self.behind(token, rest[0])]
                place += 1
            else:
                revised.append(token)
                place, sure = place + (self.word_length(rest) if self.starts_word(token) else 1), False
        said, revised = revised[0], self.capitalize(revised)[1:]
        if revised[:1] == [self.eos_token_id] and not self.is_mark(said):
            return []  # a transcript ends with a mark, which the CTC head's draft has
        return revised

    def find(self, token: int, drafted: list[int]) -> tuple[int, list[int]] | None:
        """
        Whether `token`, however it is spelt, says one of the next of the tokens `drafted`, or begins its word: up to
        where they are then said, those before it left out, and what is to be said of that word yet; or `None`.
        """
        if self.is_mark(token) or not self.word(token):
            return (1, []) if drafted[:1] == [token] else None
        said = self.tokenizer.decode([token])
        for start in range(min(REACH, len(drafted))):
            end = start + self.word_length(drafted[start:])
            word = self.tokenizer.decode(drafted[start:end]).strip()
            if word.lower().startswith(self.word(token)) and (self.starts_word(token) or start == 0):
                spelt = self.token_ids(said + word[len(said.strip()) :])
                if spelt[0] == token:
                    return end, spelt[1:]
            if self.word(drafted[start]) == self.word(token):
                return start + 1, []
        return None

    def word_length(self, drafted: list[int]) -> int:
        """How many tokens the first word of `drafted` has."""
        others = (i for i, token in enumerate(drafted) if i and (self.starts_word(token) or self.is_mark(token)))
        return next(others, len(drafted))

    def stands_before(self, token: int, drafted: int) -> bool:
        """
        Whether a token that comes in a drafted one's place belongs before it: a mark before a word, a word's later
        piece before the next word, and whatever is no mark before a mark.
        """
        if self.is_mark(drafted):
            return not self.is_mark(token)
        if token == self.eos_token_id:
            return False
        return self.starts_word(drafted) and (self.is_mark(token) or not self.starts_word(token))

    def behind(self, token: int, drafted: int) -> list[int]:
        """A drafted token as it is spelt behind `token`: no space behind a hyphen."""
        if self.tokenizer.decode([token]) == "-":
            return self.token_ids(self.tokenizer.decode([drafted]).strip())
        return [drafted]

    def capitalize(self, tokens: list[int]) -> list[int]:
        """Tokens with a capital behind each mark that ends a sentence."""
        spelt = tokens[:1]
        for before, token in pairwise(tokens):
            if ends_sentence(self.tokenizer.decode([before])) and self.starts_word(token):
                spelt += self.token_ids(" " + capitalized(self.tokenizer.decode([token]).strip()))
            else:
                spelt.append(token)
        return spelt

    def token_ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def starts_word(self, token: int) -> bool:
        # A padded vocabulary has ids without a token.
        return (self.tokenizer.convert_ids_to_tokens(token) or "").startswith(WORD_STARTS)

    def word(self, token: int) -> str:
        return self.tokenizer.decode([token]).strip().lower()

    def is_mark(self, token: int) -> bool:
        word = self.word(token)  # of a lone space nothing is left, and that begins a word
        return token == self.eos_token_id or (word != "" and not any(letter.isalnum() for letter in word))


def draft_mask(known: int, tokens: int, branches: int, place: int, dtype: torch.dtype, device) -> torch.Tensor:
    """
    The attention bias `(1, 1, tokens + branches, known + tokens + branches)` of a pass behind `known` cached tokens:
    of its tokens each sees those before it, and of the branches behind them each the first `place` tokens and itself.
    """
    size = tokens + branches
    seen = torch.ones(size, known + size, dtype=torch.bool, device=device).tril(known)
    seen[tokens:, known + place :] = torch.eye(size, dtype=torch.bool, device=device)[tokens:, place:]
    return torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill(~seen, torch.finfo(dtype).min)[None, None]


def process_rows(logits_processor, written: torch.LongTensor, beginnings: list[list[int]], logits: torch.Tensor):
    """Scores `(rows, vocabulary)` of logits that stand behind `written` `(1, tokens)` and one of `beginnings` each."""
    if all(isinstance(processor, SuppressTokensLogitsProcessor) for processor in logits_processor):
        return logits_processor(written, logits)  # which ask for no tokens: one call for all rows
    behind = [torch.cat([written, written.new_tensor([beginning])], dim=1) for beginning in beginnings]
    return torch.cat([logits_processor(*row) for row in zip(behind, logits[:, None].clone(), strict=True)])


@torch.no_grad()
def decode_with_drafts(
    model,
    input_ids,
    logits_processor,
    stopping_criteria,
    generation_config,
    draft_ids: list[int],
    draft_tokenizer,
    draft_class: type = CTCDraft,
    streamer=None,
    **kwargs,
):
    r"""
    Greedy decoding of one prompt with drafts, for `generate(custom_generate=...)`.

    Args:
        input_ids (`torch.LongTensor` of shape `(1, prompt)`), with `prompt_embeds` in `kwargs`, if it has audio.
        draft_ids, draft_tokenizer: see `CTCDraft`; `draft_class` is it or a subclass.

    Returns:
        `(1, prompt + new tokens)`, or the object that `return_dict_in_generate` asks for.
    """
    cache, mask, embedding = kwargs["past_key_values"], kwargs.get("attention_mask"), model.get_input_embeddings()
    cache.activate_past_recording()
    draft = draft_class(draft_ids, draft_tokenizer, int(generation_config._eos_token_tensor[0]))
    text_config = model.language_model.config
    branching = text_config._attn_implementation in ("eager", "sdpa") and mask is None  # the others take no such mask
    reach = getattr(text_config, "sliding_window", None) or float("inf")
    pending, prompt, done = kwargs.get("prompt_embeds"), input_ids.shape[1], False
    pending = embedding(input_ids) if pending is None else pending
    all_scores = () if generation_config.output_scores else None
    all_logits = () if generation_config.output_logits else None
    while not done:
        candidates = draft.choose_candidates(input_ids[0, prompt:].tolist())
        known, unread = cache.get_seq_length(), pending.shape[1]
        tokens, place = unread + len(candidates), unread + len(candidates) - 2
        ends = draft.other_ends() if branching and known + tokens < reach - len(END_MARKS) else []
        settings = {}
        if ends:
            positions = torch.arange(known, known + tokens, device=input_ids.device)
            settings["position_ids"] = torch.cat([positions, positions.new_full((len(ends),), known + place)])[None]
            settings["attention_mask"] = draft_mask(known, tokens, len(ends), place, pending.dtype, input_ids.device)
        elif mask is not None:
            settings["attention_mask"] = nn.functional.pad(mask, (0, known + tokens - mask.shape[1]), value=1)
        logits = model(
            inputs_embeds=torch.cat([pending, embedding(input_ids.new_tensor([candidates + ends]))], dim=1),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1 + len(candidates) + len(ends),
            **settings,
        ).logits.float()  # of the last token that is known, of each candidate, of each branch

        beginnings = [candidates[:i] for i in range(1 + len(candidates))] + [[*candidates[:-2], end] for end in ends]
        scores = process_rows(logits_processor, input_ids, beginnings, logits[0])
        predicted = scores.argmax(-1).tolist()
        matches = next((i for i, token in enumerate(candidates) if predicted[i] != token), len(candidates))
        said, rows = predicted[: matches + 1], list(range(matches + 1))
        draft.update(predicted[: 1 + len(candidates)], matches)
        if matches == len(candidates) - 2 and said[-1] in ends:
            rows.append(1 + len(candidates) + ends.index(said[-1]))
            said.append(predicted[rows[-1]])
            draft.revised = []
        cache.crop(-(len(candidates) - matches + len(ends)))
        for token, row in zip(said, rows, strict=True):
            input_ids = torch.cat([input_ids, input_ids.new_tensor([[token]])], dim=1)
            all_scores = None if all_scores is None else (*all_scores, scores[row][None])
            all_logits = None if all_logits is None else (*all_logits, logits[:, row])
            if streamer is not None:
                streamer.put(input_ids[:, -1].cpu())
            if done := bool(stopping_criteria(input_ids, all_scores).all()):
                break
        pending = embedding(input_ids.new_tensor([said[matches:]]))
    if streamer is not None:
        streamer.end()
    if not generation_config.return_dict_in_generate:
        return input_ids
    return GenerateDecoderOnlyOutput(sequences=input_ids, scores=all_scores, logits=all_logits, past_key_values=cache)
