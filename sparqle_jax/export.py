"""A model folder for others: with the frozen towers in it, or the adapter alone under the published names.

sparqle export runs/mine/stage2 mine --towers      # a folder that needs nothing else
sparqle export runs/mine/stage2 mine --merge       # the same, LoRA folded into its LLM
sparqle export runs/mine/stage2 lora --peft        # its LoRA alone, as peft reads it
sparqle export runs/mine/stage2 mine.pt            # for the PyTorch code (needs torch)
"""

import sys
from pathlib import Path

from sparqle_jax import commands
from sparqle_jax.published import peft
from sparqle_jax.published import sparqle as published
from sparqle_jax.sparqle import SparQLe


def main(argv: list[str] | None = None) -> int:
    parser = commands.make_parser("export", __doc__)
    parser.add_argument("model", type=Path, help="a model folder")
    parser.add_argument("output", type=Path, help="a new folder, or a .pt or .safetensors file")
    parser.add_argument(
        "--towers", action="store_true", help="copies the encoder and the LLM into the folder"
    )
    parser.add_argument("--merge", action="store_true", help="as --towers, and folds LoRA into the LLM")
    parser.add_argument("--peft", action="store_true", help="the LLM's LoRA alone, as a folder for peft")
    commands.add_tower_arguments(parser)
    args = parser.parse_args(argv)
    try:
        if args.output.exists():
            raise ValueError(f"{args.output} is there already: give another name, or delete it.")
        sparqle = SparQLe.from_pretrained(args.model, encoder=args.encoder, llm=args.llm)
        if (args.merge or args.peft) and sparqle.model.llm.lora is None:
            raise ValueError(f"{args.model} has no LoRA: leave --merge and --peft out.")
        if args.peft:
            llm = sparqle.config.llm
            peft.save_lora(sparqle.model.llm, args.output, base=llm.name or str(llm.folder))
        elif args.output.suffix:
            published.save(sparqle.model, args.output)
        else:
            sparqle.save_pretrained(args.output, towers=args.towers or args.merge, merge=args.merge)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
