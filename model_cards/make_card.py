"""
Write the model card of a checkpoint, its README.md, from its config, its recipe, the state of its training, and the
results of its evaluation. Nothing in a card is written by hand; made again, it is the same.

    python model_cards/make_card.py model_cards/salmonn-lite-nano --recipe training/recipes/nano/stage2.yaml \\
        --results runs/eval/nano runs/eval/captions

`--results` are the `--output` directories of `eval/run_asr.py`, `run_aac.py`, `run_qa.py` and `run_efficiency.py`. The
text around the figures is `salmonn_hf/hub/model_card_template.md`.
"""

import argparse
from pathlib import Path

from salmonn_hf.hub.model_card import make_card, write_card
from salmonn_hf.terminal import command


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="directory; README.md is written there")
    parser.add_argument("--results", type=Path, nargs="*", default=[], help="directories of finished evaluations")
    parser.add_argument("--recipe", type=Path, help="the YAML that it was trained with")
    parser.add_argument("--name", help="default: the directory's name")
    parser.add_argument("--license", default="apache-2.0", help="of what was trained; default: %(default)s")
    parser.add_argument("--language", nargs="+", default=["en"], help="default: en")
    arguments = parser.parse_args()
    checkpoint, results, language = arguments.checkpoint, arguments.results, tuple(arguments.language)
    card = make_card(checkpoint, results, arguments.recipe, arguments.name, arguments.license, language)
    write_card(card, checkpoint)
    print(checkpoint / "README.md")


if __name__ == "__main__":
    main()
