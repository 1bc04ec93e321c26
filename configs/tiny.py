"""The miniature: both stages, on speech made by `python -m sparqle_jax.demo.datasets data/tiny`."""

from pathlib import Path

from sparqle_jax.adapters import qformer
from sparqle_jax.config import Config, DataConfig, EncoderConfig, OptimConfig, Stage1Config, Stage2Config

MODELS = Path("sparqle_jax/demo/models")


def get_config() -> Config:
    return Config(
        run=Path("runs/tiny"),
        encoder=EncoderConfig(folder=MODELS / "hubert"),
        llm=MODELS / "llm",
        data=DataConfig(
            train="data/tiny/train",
            valid={"seen": "data/tiny/seen", "unseen": "data/tiny/unseen"},
            max_seconds=3.0,
            buckets=1,  # each would be compiled, and the demo takes minutes
            frames=Path("data/tiny/frames"),
        ),
        adapter=qformer.Config(
            num_queries=32,
            span_frames=150,
            hidden_size=128,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=512,
            max_position_embeddings=32,
            hidden_dropout_prob=0.05,
            attention_probs_dropout_prob=0.0,
        ),
        stage1=Stage1Config(
            tokenizer=MODELS / "words",
            embed_dim=64,
            steps=600,
            batch_size=32,
            optim=OptimConfig(lr=1e-3, warmup_steps=100, weight_decay=0.01),
            save_every=200,
        ),
        stage2=Stage2Config(
            steps=5000,
            batch_size=32,
            optim=OptimConfig(lr=1e-3, warmup_steps=200, weight_decay=0.01),
            save_every=500,
        ),
        eval_languages=("fr", "de", "es"),
        max_new_tokens=64,
        speech_pad=0.0,
    )
