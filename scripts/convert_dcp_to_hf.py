"""Export a checkpoint as a Hugging Face folder, with the arguments that users of flame know.

python scripts/convert_dcp_to_hf.py --path EXP_FOLDER --step N [--config CONFIG] [--tokenizer TOKENIZER]
writes EXP_FOLDER itself as the Hugging Face folder. `flame convert` is the general form.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from flame.checkpoint.convert import to_hf
from flame.errors import FlameError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--path", type=Path, required=True, help="the run's folder, which holds checkpoint/")
    parser.add_argument("--step", type=int, required=True)
    parser.add_argument("--config", type=Path, help="config.json or its folder, instead of that in the checkpoint")
    parser.add_argument("--tokenizer", type=Path)
    args = parser.parse_args()
    try:
        step = args.path / "checkpoint" / f"step-{args.step}"
        to_hf(step, args.path, tokenizer=args.tokenizer, config=args.config)
    except FlameError as error:
        sys.exit(str(error))
    print(f"wrote {args.path}")


if __name__ == "__main__":
    main()
