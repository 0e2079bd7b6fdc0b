"""Make a checkpoint that a run can start from out of a Hugging Face folder.

python scripts/convert_hf_to_dcp.py --model HF_FOLDER --checkpoint FOLDER/checkpoint
writes FOLDER/checkpoint/step-0, for checkpoint.initial_load_path. `flame convert` is the general form.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from flame.checkpoint.convert import from_hf
from flame.errors import FlameError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path, required=True)
    args = parser.parse_args()
    try:
        print(f"wrote {from_hf(args.model, args.checkpoint)}")
    except FlameError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
