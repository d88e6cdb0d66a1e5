"""The tests of transformers that fail on SALMONN and may: each with the reason, as in tests/README.md."""

WHOLE_LANGUAGE_MODEL = (
    "SALMONN has no base model without a head: its language model is a whole AutoModelForCausalLM, so that any of "
    "them fits, as in Granite Speech and BLIP-2"
)
KNOWN_FAILURES = {
    "test_modeling_beats.py::BeatsModelTest::test_model_get_set_embeddings": (
        "BEATs embeds patches of a spectrogram, by a convolution, and no tokens, as AST and ViT do"
    ),
    "test_modeling_salmonn.py::SalmonnWindowQFormerTest::test_model_base_model_prefix": WHOLE_LANGUAGE_MODEL,
    "test_modeling_salmonn.py::SalmonnWhisperProjectorTest::test_model_base_model_prefix": WHOLE_LANGUAGE_MODEL,
    "test_modeling_salmonn.py::SalmonnLoraTest::test_model_base_model_prefix": WHOLE_LANGUAGE_MODEL,
    "test_modeling_salmonn.py::SalmonnBeatsTest::test_model_base_model_prefix": WHOLE_LANGUAGE_MODEL,
}
