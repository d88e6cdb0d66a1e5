"""Decoding with drafts: the CTC head reads a transcript off the audio embeddings, the language model verifies it.

Speculative decoding (Leviathan et al., ICML 2023, https://arxiv.org/abs/2211.17192) in transformers' own loop for
assisted generation: one forward pass takes a whole draft, and keeps the tokens up to the first that greedy decoding
would not have chosen, and that one's replacement. The text is that of greedy decoding, in fewer passes, of which the
first reads the prompt as well.
"""

import re

import torch
from torch import nn
from transformers.generation import CandidateGenerator

PASS_TOKENS = 24  # of a draft that one pass verifies; those behind the first wrong one cost time for nothing
# Of a transcript that begins with one, a question mark is likelier at the end than a full stop.
QUESTION_WORDS = set(
    "who what where when why how which whose is are am was were do does did can could will would shall should have "
    "has isn't aren't don't doesn't didn't can't couldn't won't wouldn't haven't hasn't".split()
)


def words(text: str) -> list[str]:
    """What is heard of a text: its words, without case and punctuation."""
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
    if rest and (not text or text.rstrip().endswith((".", "?", "!"))):
        rest[0] = rest[0][0].upper() + rest[0][1:]
    unfinished = place > 0 and text[-1:].isalnum() and draft[place - 1].startswith(said[-1])
    end_of_word = draft[place - 1][len(said[-1]) :] if unfinished else ""
    ends_with_word = bool(rest) or text[-1:].isalnum()
    mark = "?" if draft and draft[0] in QUESTION_WORDS else "."
    rest = end_of_word + "".join(f" {word}" for word in rest) + (mark if ends_with_word else "")
    return rest if text else rest.lstrip()


def merge_repeats(ctc_head: nn.Module, best: torch.Tensor) -> list[int]:
    """The tokens of a greedy path `(audio tokens,)` of indices into the head's outputs: repeats merged, no blanks."""
    best = best.unique_consecutive()
    return ctc_head.token_ids[best[best > 0] - 1].tolist()


@torch.no_grad()
def best_tokens(ctc_head: nn.Module, audio_embeds: torch.Tensor, embedding: nn.Module) -> list[int]:
    """
    Greedy CTC over one clip's audio embeddings `(audio tokens, width)`: repeats merged, blanks dropped. `embedding`
    is what the head scores against, see `SalmonnModel.ctc_embedding`.
    """
    return merge_repeats(ctc_head, ctc_head.best(audio_embeds, embedding))


class CTCDraft(CandidateGenerator):
    """
    Candidates from the CTC head, for one prompt, given as `inputs_embeds`. The pass that reads it verifies the whole
    draft. Where it was wrong, what the language model itself foretold behind that place is the next draft, as in
    Jacobi decoding (Santilli et al., ACL 2023, https://arxiv.org/abs/2305.10427), if it has the words that the CTC
    head hears there.

    Args:
        draft_ids (`list[int]`): the transcript that the head reads, see `best_tokens`.
        embedding (`nn.Module`): the language model's token embeddings.
        tokenizer (`PreTrainedTokenizerBase`): the language model's.
        eos_token_id (`int`).
    """

    requires_model_outputs = True
    model_kwargs_overrides = {}

    def __init__(self, draft_ids: list[int], embedding: nn.Module, tokenizer, eos_token_id: int):
        self.embedding, self.tokenizer, self.eos_token_id = embedding, tokenizer, eos_token_id
        self.draft, self.prompt_length = words(tokenizer.decode(draft_ids)), None
        self.candidates, self.foretold = [], []

    def get_candidates(self, input_ids, model_kwargs=None, is_first_iteration=False, **kwargs):
        """`input_ids` `(1, tokens)` with the rest of the draft behind them, and no logits."""
        if is_first_iteration:
            self.prompt_length = input_ids.shape[1]
        text = self.tokenizer.decode(input_ids[0, self.prompt_length :], clean_up_tokenization_spaces=False)
        rest = continuation(text, self.draft)
        if rest is None or not self.draft:
            return input_ids, None
        drafted = self.tokenizer(rest, add_special_tokens=False)["input_ids"] + [self.eos_token_id]
        self.candidates = self.nearest(drafted)[:PASS_TOKENS]
        candidates = input_ids.new_tensor([self.candidates])
        if is_first_iteration:
            embeds = self.embedding(candidates)
            model_kwargs["inputs_embeds"] = torch.cat([model_kwargs["inputs_embeds"], embeds], dim=1)
        return torch.cat([input_ids, candidates], dim=1), None

    def nearest(self, drafted: list[int]) -> list[int]:
        """Of a draft of the CTC head, and of what was foretold with and without the wrong token, the one to verify."""
        heard = words(self.tokenizer.decode(drafted))
        for foretold in sorted(self.foretold, key=lambda tokens: tokens[:1] != drafted[:1]):
            said = words(self.tokenizer.decode(foretold))
            if alignment_costs(said, heard)[-1] <= len(heard) / 4:
                return foretold
        return drafted

    def update_candidate_strategy(self, input_ids, scores, num_matches):
        """
        Keep what the pass foretold behind the first wrong candidate, which the language model either replaced, or put
        another token before.
        """
        behind = scores[0, num_matches + 1 :].argmax(-1).tolist() if num_matches < len(self.candidates) else []
        if self.eos_token_id in behind:
            behind = behind[: behind.index(self.eos_token_id) + 1]
        wrong = self.candidates[num_matches : num_matches + 1]
        self.foretold = [behind, wrong + behind] if behind else []
