"""Drafts that are a written transcript, with capitals and marks: the one that the language model reads."""

import re

from .ctc_draft import CTCDraft, place_in_draft, words


class TranscriptDraft(CTCDraft):
    """As [`CTCDraft`], but the draft's spelling is kept: `draft_ids` are those of a text as it may be the answer."""

    def __init__(self, draft_ids: list[int], tokenizer, eos_token_id: int):
        super().__init__(draft_ids, tokenizer, eos_token_id)
        self.text = tokenizer.decode(draft_ids).strip()
        self.ends = [0, *(match.end() for match in re.finditer(r"[\w']+", self.text.replace("’", "'")))]

    def rest_of_draft(self, written: list[int]) -> list[int]:
        """What the transcript has behind the tokens that the language model has written."""
        text = self.tokenizer.decode(written, clean_up_tokenization_spaces=False)
        said = words(text)
        place, distance = place_in_draft(said, self.draft)
        if distance > 2 + len(said) / 2:
            return []
        rest = self.text[self.ends[place] :]
        if place and re.search(r"[\w'’]$", text):
            if self.draft[place - 1].startswith(said[-1]):
                rest = self.draft[place - 1][len(said[-1]) :] + rest  # a word that is not finished
        elif text:
            rest = re.sub(r"^[^\w\s]+", "", rest)  # a mark that is written already
        if not text or text[-1].isspace():
            rest = rest.lstrip()
        return self.token_ids(rest) + [self.eos_token_id]
