"""The paper's adapter in front of Llama-3-70B-Instruct, planned for v5p-64 (32 chips); both stages.

    python -m sparqle_jax.train configs/large.py --set data.train=FOLDER --distributed

`python -m sparqle_jax.plan_tpu configs/large.py --topology v5p-64` says what it takes there.
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
        run=Path("runs/large"),
        mesh=MeshConfig(data=1, fsdp=-1),
        encoder=EncoderConfig(folder=Path("hubert-large-ll60k")),
        llm=Path("Meta-Llama-3-70B-Instruct"),
        data=DataConfig(
            train="data/train",
            valid={"valid": "data/valid"},
            max_seconds=30.0,
            buckets=4,
            batch_multiple=32,
            workers=16,
        ),
        adapter=qformer.Config(num_queries=100, cross_attention_freq=2),
        init_from=Path("bert-base-uncased"),
        stage1=Stage1Config(tokenizer=Path("bert-base-uncased"), steps=100_000, batch_size=64, optim=optim),
        stage2=Stage2Config(steps=50_000, batch_size=64, optim=optim, remat="full"),
        dtype="bfloat16",
    )
