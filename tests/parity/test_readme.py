"""The README's example with the published weights, on tiny models under the names of the large ones."""

import shutil

from transformers import LlamaConfig, LlamaForCausalLM

from sparqle_jax.published import sparqle as published
from tests.test_prompts import LLAMA3, tokenizer
from tests.test_readme import BLOCKS, folders, run  # noqa: F401


def test_published_weights(folders, tiny, sparqle, capsys):  # noqa: F811
    published.save(sparqle, folders / "SparQLe_best.pt")
    llama = folders / "Meta-Llama-3-8B-Instruct"
    shutil.rmtree(llama)
    sizes = {"vocab_size": 128, "max_position_embeddings": 512}  # room for a tokenizer of characters
    LlamaForCausalLM(LlamaConfig(**{**tiny.config["llm"], **sizes})).save_pretrained(llama)
    tokenizer(LLAMA3).save_pretrained(llama)
    (folders / "system_prompt.txt").write_text("Be brief.")
    names = run(BLOCKS[2])
    before = names["prompter"].tokenizer.decode(names["ask"][0]).replace(" ", "")
    assert before.startswith("<bos><bos><|start_header_id|>system")
    assert capsys.readouterr().out.endswith("\n")
