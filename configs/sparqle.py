"""The paper's setting: HuBERT-large, a Q-Former of 100 queries from BERT, Llama-3-8B-Instruct; both stages.

    python -m sparqle_jax.train configs/sparqle.py --set data.train=FOLDER

Planned for a slice of 16 chips (v5e-16, v6e-16, v4-32), and fits fewer of the larger ones (v5p-8):
`python -m sparqle_jax.plan_tpu configs/sparqle.py --topology v5e-16`. The folders are as `hf download`
leaves them; learning rate and warm-up are the reference's.
"""

from pathlib import Path

from sparqle_jax.adapters import qformer
from sparqle_jax.config import (
    Config,
    DataConfig,
    EncoderConfig,
    MeshConfig,
    OptimConfig,
    Stage1Config,
    Stage2Config,
)


def get_config() -> Config:
    optim = OptimConfig(lr=1e-4, warmup_steps=1000, weight_decay=0.05, final_lr_factor=0.1)
    return Config(
        run=Path("runs/sparqle"),
        mesh=MeshConfig(data=1, fsdp=-1),  # the LLM is too large to be whole on every chip
        encoder=EncoderConfig(folder=Path("hubert-large-ll60k")),
        llm=Path("Meta-Llama-3-8B-Instruct"),
        data=DataConfig(
            train="data/train",
            valid={"valid": "data/valid"},
            max_seconds=30.0,
            buckets=4,
            batch_multiple=32,  # two slices of 16 chips as well
            workers=16,
        ),
        adapter=qformer.Config(num_queries=100, cross_attention_freq=2),
        init_from=Path("bert-base-uncased"),
        stage1=Stage1Config(tokenizer=Path("bert-base-uncased"), steps=100_000, batch_size=32, optim=optim),
        stage2=Stage2Config(steps=50_000, batch_size=64, optim=optim, remat="full"),
        dtype="bfloat16",
    )
