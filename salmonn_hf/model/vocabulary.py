"""The language model's vocabulary as the whole model's: its embeddings, its head, and how many tokens they have."""

import math

from torch import nn

OTHER_LIBRARIES = ("bitsandbytes", "gptqmodel", "torchao", "peft")  # layers of theirs, though made of torch's


class VocabularyMixin:
    """Embeddings and head of a `SalmonnModel`, which are its language model's."""

    def get_input_embeddings(self):
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value):
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self):
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, value):
        self.language_model.set_output_embeddings(value)

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Module:
        """
        As in transformers, of the language model. Its weights are then no base part's, and checkpoints hold them.

        Raises:
            ValueError: before anything is changed, if embeddings or head are quantised or have LoRA, or if one of the
                tokens that the model knows by their ids would be lost.
        """
        embedding, head = self.get_input_embeddings(), self.get_output_embeddings()
        if new_num_tokens is None and pad_to_multiple_of is None:
            return embedding
        for module, kind in ((embedding, nn.Embedding), (head, nn.Linear)):
            if not isinstance(module, kind) or type(module).__module__.partition(".")[0] in OTHER_LIBRARIES:
                raise ValueError(
                    f"The language model's {type(module).__name__} cannot be resized. Do so before it is quantised, "
                    "and with LoRA in embeddings or head merged."
                )
        size = embedding.num_embeddings if new_num_tokens is None else new_num_tokens
        size = math.ceil(size / pad_to_multiple_of) * pad_to_multiple_of if pad_to_multiple_of else size
        for name, ids in self.tokens_by_id().items():
            if (highest := max(ids, default=-1)) >= size:
                raise ValueError(
                    f"{name} has token {highest}, which a vocabulary of {size} tokens lacks; keep more of them."
                )
        embedding = self.language_model.resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        self.config.text_config.vocab_size = self.vocab_size = embedding.num_embeddings
        if self.config.base_parts:
            self.config.base_parts = {
                part: name for part, name in self.config.base_parts.items() if part != "language_model"
            }
        return embedding

    def tokens_by_id(self) -> dict[str, list[int]]:
        """Tokens of the language model that the model knows by their ids, by the names of what knows them."""
        tokens = {"config.audio_token_id": [self.config.audio_token_id]}
        tokens |= {f"projector.{name}": ids.tolist() for name, ids in self.projector.vocabulary_ids().items()}
        request = getattr(getattr(self, "generation_config", None), "transcription_ids", None)
        return tokens | {"generation_config.transcription_ids": request or []}
