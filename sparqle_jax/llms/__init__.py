"""Language models: a prompt of embeddings -> an answer. A part is a file; each has these names:

    Config                          frozen dataclass of sizes
      from_dict(config)             from transformers' config.json; ValueError for what is not supported
      width, vocab_size             M, V
      max_tokens                    the most that prompt and answer have together
      flops(size, prompt, answer)   matrix products of a forward pass: with weights, and without (attention)
    LLM(config, *, dtype, param_dtype, remat, rngs)
      embed(ids)                    int [B, L] -> [B, L, M]
      logits(hidden)                [..., M] -> float32 [..., V]
      answer_states(prompt, prompt_mask, answer, answer_mask)   [B, P, M], bool [B, P], int and bool [B, L]
                                    -> hidden [B, L, M]: those that predict each token of the answer
      prefill(prompt, mask, size)   -> hidden [B, M], which predicts the first token, and a cache with room
                                    for `size` tokens
      step(ids, cache)              int [B] -> hidden [B, M], cache
      config, dtype, remat, TRAINED patterns of its parameters that train: none of a frozen LLM but LoRA's
      lora                          LoRA's configuration; None, as a class attribute, without (see `lora.add`)
    PREFIXES, table(config)         prefixes of its tensors in transformers' files; which is which parameter

A cache is the LLM's own; `generate.py` asks it for take(rows), repeat(beams), reorder(parents) and split().
Padding in prompt and answer is neither seen nor counted.
"""

from types import ModuleType

from sparqle_jax.llms import decoder

# By the `model_type` in config.json.
FAMILIES: dict[str, ModuleType] = dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), decoder)
