"""Makes the tokenizer of the miniature's adapter, which reads English transcripts word by word in stage 1.

python -m sparqle_jax.demo.tokenizer FOLDER
"""

import argparse
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from sparqle_jax.demo import grammar


def make_tokenizer(seed: int = 0) -> PreTrainedTokenizerFast:
    """A token for each word of the grammar, between [CLS] and [SEP] as in BERT."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    texts = [sentence["en"] for sentence in grammar.sentences(5000, seed, test=False)]
    words = special + sorted({word for text in texts for word in text.split()})
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "python -m sparqle_jax.demo.tokenizer", description=__doc__.split("\n")[0]
    )
    parser.add_argument("folder", type=Path)
    make_tokenizer().save_pretrained(parser.parse_args(argv).folder)


if __name__ == "__main__":
    main()
