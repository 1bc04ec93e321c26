"""A model folder from a checkpoint in the published names, such as SparQLe_best.pt, and its towers' folders.

    sparqle import SparQLe_best.pt sparqle --encoder hubert-large-ll60k --llm Meta-Llama-3-8B-Instruct \\
        --published --system-prompt system_prompt.txt

--published is for the published weights: it keeps what they were made with (see compat.py), and decodes as
their code does. Without it, for a checkpoint that was trained here or as here.
"""

import sys
from pathlib import Path

import jax.numpy as jnp

from sparqle_jax import assemble, commands, pretrained
from sparqle_jax.published import sparqle as published
from sparqle_jax.sparqle import ModelConfig, SparQLe, Tower

# As the reference's generation.py decodes.
PUBLISHED = dict(num_beams=5, no_repeat_ngram_size=2, early_stopping=True)


def main(argv: list[str] | None = None) -> int:
    parser = commands.make_parser("import", __doc__)
    parser.add_argument("checkpoint", type=Path, help=".pt (needs torch) or .safetensors")
    parser.add_argument("output", type=Path, help="a new folder")
    parser.add_argument("--encoder", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--llm", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--published", action="store_true", help="the published weights")
    parser.add_argument(
        "--system-prompt", type=Path, metavar="FILE", help="the system prompt it was trained with"
    )
    parser.add_argument("--num-attention-heads", type=int, help="of a Q-Former that is not as wide as BERT's")
    parser.add_argument("--max-seconds", type=float, default=30.0, help="the longest it was trained on (30)")
    parser.add_argument("--max-new-tokens", type=int, default=75, help="of an answer (75)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    args = parser.parse_args(argv)
    try:
        if args.output.exists():
            raise ValueError(f"{args.output} is there already: give another name, or delete it.")
        config = ModelConfig(
            encoder=Tower.of(args.encoder),
            llm=Tower.of(args.llm),
            max_seconds=args.max_seconds,
            max_new_tokens=args.max_new_tokens,
            # The published code leaves all silence where it is.
            speech_pad=args.max_seconds if args.published else 0.25,
            dtype=args.dtype,
            compat="published" if args.published else None,
            system=args.system_prompt and args.system_prompt.read_text(),
            generation=PUBLISHED if args.published else {},
        )
        dtype = jnp.dtype(args.dtype)
        heads = {} if args.num_attention_heads is None else {"num_attention_heads": args.num_attention_heads}
        parts = assemble.read_parts(args.checkpoint, **heads)
        model = published.load_speech_llm(
            args.checkpoint,
            assemble.load_encoder(args.encoder, parts, compat=config.compat, dtype=dtype),
            pretrained.load_llm(args.llm, dtype=dtype),
            compat=config.compat,
            dtype=dtype,
            **heads,
        )
        SparQLe.of(model, config).save_pretrained(args.output)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(f"{args.output}: sparqle transcribe RECORDING --model {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
