"""A model that is trained already, fine-tuned on recordings of your own; here the miniature, on one device.

    python -m sparqle_jax.train configs/finetune.py --set data.train=FOLDER --set run=runs/mine

For another model, set adapter.start to its adapter.safetensors, encoder, llm, dtype and data.max_seconds to what
its config.json says. Minutes of speech need hundreds of steps; `data.test` shows when it is too many.
"""

from pathlib import Path

from sparqle_jax.config import AdapterConfig, Config, DataConfig, OptimConfig, Stage2Config
from sparqle_jax.sparqle import MINIATURE

MODELS = MINIATURE.parent


def get_config() -> Config:
    return Config(
        run=Path("runs/finetune"),
        encoder=MODELS / "hubert",
        llm=MODELS / "llm",
        data=DataConfig(train="data/mine", max_seconds=3.0, buckets=1, batch_multiple=1),
        adapter=AdapterConfig(start=MINIATURE / "adapter.safetensors"),
        stage2=Stage2Config(
            steps=200,
            batch_size=10,
            optim=OptimConfig(lr=3e-4, warmup_steps=20, weight_decay=0.01),
            save_every=100,
        ),
        max_new_tokens=64,
    )
