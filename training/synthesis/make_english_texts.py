"""
Write plain English sentences, one a line, as a source of text alone.

    python training/synthesis/make_english_texts.py --output data/english-texts.txt --sentences 12000 \\
        --leave_out data/synthetic-dev.parquet

From `--text`, files with a paragraph between empty lines, by default what Debian's `fortunes` holds.
"""

import argparse
from pathlib import Path

import pyarrow.parquet as pq
from english_texts import default_text_files, load_texts

from salmonn_hf.terminal import command


@command
def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, nargs="+", help="default: those of Debian's fortunes")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--sentences", type=int, default=12_000)
    parser.add_argument("--leave_out", type=Path, nargs="*", default=[], help="Parquet files whose texts are held out")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)

    files = args.text or default_text_files()
    if not files:
        raise ValueError("There is no text to take; install Debian's fortunes, or name files with --text.")
    held_out = {text for file in args.leave_out for text in pq.read_table(file)["text"].to_pylist()}
    texts = [text for text in load_texts(files, args.seed) if text not in held_out][: args.sentences]
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text("\n".join(texts) + "\n", encoding="utf-8")
    print(f"{args.output}: {len(texts)} sentences")


if __name__ == "__main__":
    main()
