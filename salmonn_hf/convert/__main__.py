"""Checkpoints of the original BEATs and SALMONN implementations to this package's, and back; of 0.1.0 to today's.

python -m salmonn_hf.convert beats BEATs_iter3_plus_AS2M.pt OUT
python -m salmonn_hf.convert salmonn salmonn_v1.pth OUT --whisper DIR --beats BEATs.pt --llm DIR
python -m salmonn_hf.convert export DIR OUT.pth
python -m salmonn_hf.convert migrate OLD NEW
"""

import argparse
import sys

from transformers import AutoConfig

from ..terminal import command
from .beats import convert_beats, export_beats
from .export_salmonn import export_salmonn
from .migrate import migrate
from .salmonn import convert_salmonn


def parse_arguments(arguments=None):
    parser = argparse.ArgumentParser(
        prog="python -m salmonn_hf.convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)

    beats = commands.add_parser("beats", help="an original BEATs .pt file to a checkpoint directory")
    salmonn = commands.add_parser("salmonn", help="an original SALMONN .pth file to an adapter checkpoint directory")
    salmonn.add_argument("--whisper", required=True, help="directory or hub name of the Whisper it was trained with")
    salmonn.add_argument("--llm", required=True, help="directory or hub name of its language model")
    salmonn.add_argument("--beats", help="its original BEATs .pt file, if it has one")
    heads = "attention heads of the Q-Former; default: 12 where it is BERT base, else 4"
    salmonn.add_argument("--qformer-heads", type=int, help=heads)
    salmonn.add_argument("--audio-token", help="token that stands for one audio embedding, which text never uses")
    salmonn.add_argument("--audio-token-id", type=int, help="its id, for a language model without a tokenizer")
    export = commands.add_parser("export", help="a checkpoint directory to a file in the original's layout")
    migrate = commands.add_parser("migrate", help="a checkpoint directory of salmonn_hf 0.1.0 to one that loads today")
    for subparser in (beats, salmonn, export, migrate):
        subparser.add_argument("directory" if subparser is export else "source")
        subparser.add_argument("out")
    return parser.parse_args(arguments)


@command
def main(arguments=None):
    settings = vars(parse_arguments(arguments))
    command = settings.pop("command")
    if command == "export":
        is_beats = AutoConfig.from_pretrained(settings["directory"]).model_type == "beats"
        function = export_beats if is_beats else export_salmonn
    else:
        function = {"beats": convert_beats, "salmonn": convert_salmonn, "migrate": migrate}[command]
    try:
        print(function(**settings) or f"written: {settings['out']}")
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
