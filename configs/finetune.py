"""A trained model, fine-tuned on minutes of recordings of your own, by stage 2 alone.

    python -m sparqle_jax.data.prepare manifest data/mine --manifest mine.jsonl --max-seconds 3
    python -m sparqle_jax.train configs/finetune.py --set data.train=data/mine --set run=runs/mine

Here it is the miniature, which hears 3 s at once. For another model set init_from to its
adapter.safetensors, and encoder.folder, llm, dtype and data.max_seconds to what its config.json says. Fewer
recordings than stage2.batch_size are an error: make it smaller. With hundreds of them, keep some for
data.valid: stage2.eval_every=100 shows when it is too many steps. launch/colab_finetune.ipynb does all this.
"""

from pathlib import Path

from sparqle_jax.config import Config, DataConfig, EncoderConfig, OptimConfig, Stage2Config
from sparqle_jax.sparqle import MINIATURE

MODELS = MINIATURE.parent


def get_config() -> Config:
    return Config(
        run=Path("runs/finetune"),
        encoder=EncoderConfig(folder=MODELS / "hubert"),
        llm=MODELS / "llm",
        data=DataConfig(
            train="data/mine",
            max_seconds=3.0,
            buckets=1,  # each would be compiled, and the recordings are short
            frames=Path("data/frames"),  # the encoder hears each recording once
        ),
        init_from=MINIATURE / "adapter.safetensors",
        stage2=Stage2Config(
            steps=200,
            batch_size=10,
            optim=OptimConfig(lr=1e-3, warmup_steps=20, weight_decay=0.01),
            save_every=100,
        ),
        max_new_tokens=64,
        speech_pad=0.0,
    )
