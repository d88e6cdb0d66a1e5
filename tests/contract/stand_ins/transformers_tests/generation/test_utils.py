"""
What transformers' GenerationTesterMixin, whose file the archive lacks, asks of `generate`: each way of decoding gives
what its definition says, computed here step by step from `forward` without a cache.
"""

import copy

import torch
from transformers import DynamicCache, StaticCache, set_seed
from transformers.generation import GenerateBeamDecoderOnlyOutput, GenerateDecoderOnlyOutput

NEW_TOKENS = 4


class GenerationTesterMixin:
    def _prepare_for_generation(self, model_class, batch_size=2):
        """A model in evaluation that never ends an answer by itself, and inputs of so many rows."""
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        set_seed(0)
        model = model_class(config).eval()
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = self.model_tester.pad_token_id
        return model, {name: value[:batch_size] for name, value in inputs.items()}

    def _models(self, batch_size=2):
        for model_class in self.all_generative_model_classes:
            yield self._prepare_for_generation(model_class, batch_size)

    def _generate(self, model, inputs, **kwargs):
        length = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
        return model.generate(**copy.deepcopy(inputs), **{"do_sample": False} | length | kwargs)

    @torch.no_grad()
    def _scores(self, model, inputs, new_tokens):
        """Log-probabilities `(rows, vocabulary)` of the token after the prompt and `new_tokens` `(rows, tokens)`."""
        inputs = dict(inputs)
        mask = torch.cat([inputs["attention_mask"], torch.ones_like(new_tokens)], dim=1)
        inputs |= {"input_ids": torch.cat([inputs["input_ids"], new_tokens], dim=1), "attention_mask": mask}
        position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
        scores = model(**inputs, position_ids=position_ids, use_cache=False).logits[:, -1].float().log_softmax(-1)
        scores[:, model.generation_config.suppress_tokens or []] = float("-inf")
        return scores

    def _greedy(self, model, inputs):
        new_tokens = inputs["input_ids"][:, :0]
        for _ in range(NEW_TOKENS):
            token = self._scores(model, inputs, new_tokens).argmax(-1, keepdim=True)
            new_tokens = torch.cat([new_tokens, token], dim=1)
        return torch.cat([inputs["input_ids"], new_tokens], dim=1)

    def test_inherits_generation_mixin(self):
        self.assertTrue(self.all_generative_model_classes)

    def test_greedy_generate(self):
        for model, inputs in self._models():
            expected = self._greedy(model, inputs)
            for settings in ({}, {"use_cache": False}, {"cache_implementation": "static"}, {"logits_to_keep": 1}):
                self.assertEqual(self._generate(model, inputs, **settings).tolist(), expected.tolist(), settings)

    def test_greedy_generate_dict_outputs(self):
        for model, inputs in self._models():
            model.set_attn_implementation("eager")
            wanted = ("output_scores", "output_logits", "output_hidden_states", "output_attentions")
            for use_cache in (True, False):
                settings = dict.fromkeys(wanted, True) | {"return_dict_in_generate": True, "use_cache": use_cache}
                out = self._generate(model, inputs, **settings)
                self.assertIsInstance(out, GenerateDecoderOnlyOutput)
                self.assertEqual(out.sequences.tolist(), self._greedy(model, inputs).tolist())
                rows, prompt = inputs["input_ids"].shape
                self._check_outputs(model.config.get_text_config(), out, rows, prompt, use_cache)

    def _check_outputs(self, config, out, rows, prompt, use_cache):
        """Shapes of all that a step can return; with a cache a step after the first has one query."""
        self.assertEqual([s.shape for s in out.scores], [(rows, config.vocab_size)] * NEW_TOKENS)
        self.assertEqual([s.shape for s in out.logits], [(rows, config.vocab_size)] * NEW_TOKENS)
        for step, (hidden_states, attentions) in enumerate(zip(out.hidden_states, out.attentions, strict=True)):
            keys = prompt + step
            queries = 1 if use_cache and step else keys
            states = [(rows, queries, config.hidden_size)] * (config.num_hidden_layers + 1)
            self.assertEqual([h.shape for h in hidden_states], states)
            weights = [(rows, config.num_attention_heads, queries, keys)] * config.num_hidden_layers
            self.assertEqual([a.shape for a in attentions], weights)
        if use_cache:
            self.assertEqual(out.past_key_values.get_seq_length(), prompt + NEW_TOKENS - 1)

    def test_past_key_values_format(self):
        for model, inputs in self._models():
            cache = model(**inputs, use_cache=True).past_key_values
            config = model.config.get_text_config()
            rows, length = inputs["input_ids"].shape
            shape = (rows, config.num_key_value_heads, length, config.head_dim)
            self.assertIsInstance(cache, DynamicCache)
            self.assertEqual([layer.keys.shape for layer in cache.layers], [shape] * config.num_hidden_layers)

    def test_sample_generate(self):
        for model, inputs in self._models():
            settings = {"do_sample": True, "top_k": 5, "num_return_sequences": 3, "return_dict_in_generate": True}
            set_seed(0)
            out = self._generate(model, inputs, **settings, output_logits=True)
            set_seed(0)
            again = self._generate(model, inputs, **settings)
            self.assertEqual(out.sequences.tolist(), again.sequences.tolist())
            prompts = inputs["input_ids"].repeat_interleave(3, dim=0)
            self.assertEqual(out.sequences[:, : prompts.shape[1]].tolist(), prompts.tolist())
            repeated = {name: value.repeat_interleave(3, dim=0) for name, value in inputs.items()}
            for step in range(NEW_TOKENS):
                new_tokens = out.sequences[:, prompts.shape[1] :]
                scores = self._scores(model, repeated, new_tokens[:, :step])
                self.assertTrue((scores.topk(5).indices == new_tokens[:, step : step + 1]).any(-1).all())

    def test_beam_search_generate(self):
        for model, inputs in self._models(batch_size=2):
            settings = {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.0}
            out = self._generate(model, inputs, **settings, return_dict_in_generate=True, output_scores=True)
            self.assertIsInstance(out, GenerateBeamDecoderOnlyOutput)
            plain = self._generate(model, inputs, **settings)
            uncached = self._generate(model, inputs, **settings, use_cache=False)
            self.assertEqual(plain.tolist(), out.sequences.tolist())
            self.assertEqual(plain.tolist(), uncached.tolist())
            for row in range(2):
                one = {name: value[row : row + 1] for name, value in inputs.items()}
                expected = self._beams(model, one, num_beams=3)[:2]
                torch.testing.assert_close(out.sequences_scores[2 * row : 2 * row + 2], torch.tensor(expected)[:, 0])

    def _beams(self, model, inputs, num_beams):
        """The best `(score, tokens)` of one row, by beam search without an end."""
        beams = [(0.0, [])]
        for _ in range(NEW_TOKENS):
            candidates = []
            for score, tokens in beams:
                scores = self._scores(model, inputs, torch.tensor([tokens], dtype=torch.long).view(1, -1))[0]
                best = scores.topk(num_beams)
                candidates += [(score + s, [*tokens, t]) for s, t in zip(*map(torch.Tensor.tolist, best), strict=True)]
            beams = sorted(candidates, reverse=True)[:num_beams]
        return [(score, 0) for score, _ in beams]

    def test_beam_sample_generate(self):
        for model, inputs in self._models():
            sequences = self._generate(model, inputs, do_sample=True, num_beams=2)
            self.assertEqual(sequences.shape, (2, inputs["input_ids"].shape[1] + NEW_TOKENS))

    def test_assisted_decoding_matches_greedy_search(self):
        for model, inputs in self._models(batch_size=1):
            expected = self._greedy(model, inputs)
            assistant = copy.deepcopy(model)
            for settings in ({"assistant_model": assistant}, {"prompt_lookup_num_tokens": 2}):
                try:
                    sequences = self._generate(model, inputs, **settings)
                except ValueError as error:  # refused, and by name
                    self.assertIn(next(iter(settings)), str(error))
                    continue
                self.assertEqual(sequences.tolist(), expected.tolist(), settings)

    def test_left_padding_compatibility(self):
        for model, inputs in self._models():
            padding = torch.full((2, 5), model.generation_config.pad_token_id)
            padded = dict(inputs)
            padded["input_ids"] = torch.cat([padding, inputs["input_ids"]], dim=1)
            padded["attention_mask"] = torch.cat([torch.zeros_like(padding), inputs["attention_mask"]], dim=1)
            kept = self._generate(model, padded)[:, 5:]
            self.assertEqual(kept.tolist(), self._generate(model, inputs).tolist())
            scores = self._scores(model, padded, padding[:, :0])
            torch.testing.assert_close(scores, self._scores(model, inputs, padding[:, :0]), rtol=1e-4, atol=1e-4)

    def test_generate_from_inputs_embeds(self):
        """Ready embeddings, as of a prompt without a clip, give what their tokens give; alone, only the new tokens."""
        for model, inputs in self._models():
            ids = inputs["input_ids"][:, -6:]
            text = {"attention_mask": torch.ones_like(ids)}
            expected = self._generate(model, {"input_ids": ids} | text)
            embeds = {"inputs_embeds": model.get_input_embeddings()(ids).detach()}
            for cache in (None, "static"):
                new_tokens = self._generate(model, embeds | text, cache_implementation=cache)
                self.assertEqual(new_tokens.tolist(), expected[:, ids.shape[1] :].tolist())
            both = self._generate(model, embeds | text | {"input_ids": ids})
            self.assertEqual(both.tolist(), expected.tolist())

    def test_generate_continue_from_past_key_values(self):
        for model, inputs in self._models():
            whole = self._generate(model, inputs)
            first = self._generate(model, inputs, max_new_tokens=2, min_new_tokens=2, return_dict_in_generate=True)
            rest = {"input_ids": first.sequences, "past_key_values": first.past_key_values}
            rest["attention_mask"] = torch.nn.functional.pad(inputs["attention_mask"], (0, 2), value=1)
            second = model.generate(**rest, do_sample=False, max_new_tokens=NEW_TOKENS - 2)
            self.assertEqual(second.tolist(), whole.tolist())

    def test_generate_with_static_cache(self):
        for model, inputs in self._models():
            settings = {"cache_implementation": "static", "return_dict_in_generate": True}
            out = self._generate(model, inputs, **settings)
            self.assertIsInstance(out.past_key_values, StaticCache)
            self.assertEqual(out.sequences.tolist(), self._greedy(model, inputs).tolist())

    def test_generate_methods_with_logits_to_keep(self):
        for model, inputs in self._models():
            for settings in ({}, {"num_beams": 2}):
                one = self._generate(model, inputs, logits_to_keep=1, **settings)
                self.assertEqual(one.tolist(), self._generate(model, inputs, **settings).tolist())

    def test_stopping(self):
        for model, inputs in self._models(batch_size=1):
            greedy = self._greedy(model, inputs)[0].tolist()
            prompt = inputs["input_ids"].shape[1]
            end = greedy[prompt + 1]
            stopped = self._generate(model, inputs, eos_token_id=end, min_new_tokens=None)[0].tolist()
            self.assertEqual(stopped, greedy[: greedy.index(end, prompt) + 1])
