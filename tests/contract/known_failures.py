"""The tests of transformers that fail on SALMONN and may: each with the reason, as in tests/README.md."""

KNOWN_FAILURES = {}
