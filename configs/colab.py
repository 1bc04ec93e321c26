"""HuBERT-base and Llama-3.2-1B-Instruct, planned for one chip (v5e-1, Colab's); stage 2 alone.

    python -m sparqle_jax.train configs/colab.py --set data.train=FOLDER

`python -m sparqle_jax.plan_tpu configs/colab.py --topology v5e-1` says what it takes there. Set init_from
to the adapter.safetensors of a stage 1, or of a run on other data, to begin with it.
"""

from pathlib import Path

from sparqle_jax.adapters import qformer
from sparqle_jax.config import Config, DataConfig, EncoderConfig, OptimConfig, Stage2Config


def get_config() -> Config:
    return Config(
        run=Path("runs/colab"),
        encoder=EncoderConfig(folder=Path("hubert-base-ls960")),
        llm=Path("Llama-3.2-1B-Instruct"),
        data=DataConfig(train="data/train", valid={"valid": "data/valid"}, max_seconds=20.0, buckets=3),
        adapter=qformer.Config(num_queries=64),
        init_from=Path("bert-base-uncased"),
        stage2=Stage2Config(
            steps=10_000,
            batch_size=16,
            optim=OptimConfig(lr=1e-4, warmup_steps=500, weight_decay=0.05, final_lr_factor=0.1),
            save_every=500,
            remat="full",
        ),
        dtype="bfloat16",
    )
