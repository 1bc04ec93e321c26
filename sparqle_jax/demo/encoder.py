"""Trains the miniature's HuBERT by HuBERT's self-supervision: it hears sounds, and sees no text.

    python -m sparqle_jax.demo.encoder DATASET FOLDER

Frames are labelled by k-means, first over MFCCs, then over the features of the model's own first round; it
learns to tell the labels of frames that are masked, and of those that are not (HuBERT, arXiv 2106.07447,
section III, with alpha = 0.5: from masked frames alone a model this small does not start to learn for long).
"""

import argparse
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.fft
import tqdm
from flax import nnx
from sklearn.cluster import MiniBatchKMeans
from transformers import HubertConfig as TransformersHubertConfig
from transformers import Wav2Vec2FeatureExtractor
from transformers.audio_utils import mel_filter_bank, spectrogram, window_function

from sparqle_jax import audio, encoders, layers, pretrained
from sparqle_jax.data.dataset import DataSet

hubert = encoders.FAMILIES["hubert"]

HOP = 320  # samples per frame
CROP = 80  # frames per example of a batch
CLUSTERS = 100
MASK_PROBABILITY, MASK_FRAMES = 0.065, 10
RECORDINGS = 8000  # of the data set; more would only take longer to label


class Predictor(nnx.Module):
    """The parts that pre-training adds to the encoder: the embedding of masked frames, and one per label."""

    def __init__(self, width: int, features: int = 64, *, rngs: nnx.Rngs):
        self.mask_embedding = nnx.Param(jax.random.uniform(rngs.params(), (width,)), axes=(None,))
        self.labels = nnx.Param(jax.random.normal(rngs.params(), (CLUSTERS, features)), axes=(None, None))
        self.projection = layers.linear(
            width, features, (None, None), dtype=jnp.float32, param_dtype=jnp.float32, rngs=rngs
        )

    def __call__(self, frames: jax.Array) -> jax.Array:
        """frames [B, T, D] -> logits [B, T, CLUSTERS]: cosines, divided by 0.1."""
        return (
            optax.cosine_similarity(self.projection(frames)[:, :, None], self.labels[...], epsilon=1e-6) / 0.1
        )


def mfcc(waveform: np.ndarray) -> np.ndarray:
    """waveform [S] -> float32 [T, 39]: 13 coefficients with their first and second differences.

    One row for each frame of the encoder, from the same samples. Each coefficient has mean 0 and variance 1
    over the recording, so that labels are of sounds more than of voices.
    """
    mel = spectrogram(
        waveform,
        window_function(400, "hann"),
        frame_length=400,
        hop_length=HOP // 2,
        fft_length=512,
        power=2.0,
        center=False,
        mel_filters=mel_filter_bank(257, 40, 20.0, 8000.0, audio.SAMPLE_RATE, mel_scale="htk"),
        mel_floor=1e-8,
        log_mel="log",
    )
    coefficients = scipy.fft.dct(mel.T, norm="ortho", axis=1)[:, :13]
    first = np.gradient(coefficients, axis=0)
    features = np.concatenate([coefficients, first, np.gradient(first, axis=0)], 1)[::2]
    return ((features - features.mean(0)) / (features.std(0) + 1e-5)).astype(np.float32)


def label(features: list[np.ndarray], seed: int) -> list[np.ndarray]:
    """Clusters the frames of all recordings: features [T, D] each -> labels int [T] each."""
    sample = np.concatenate(features[: len(features) // 2])
    kmeans = MiniBatchKMeans(CLUSTERS, batch_size=10_000, n_init=3, max_no_improvement=20, random_state=seed)
    kmeans.fit(sample)
    labels = kmeans.predict(np.concatenate(features))
    return np.split(labels, np.cumsum([len(f) for f in features])[:-1])


def draw_batch(
    waveforms: list[np.ndarray], labels: list[np.ndarray], size: int, rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """Random crops: waveform float [B, S], labels int [B, CROP], masked bool [B, CROP]."""
    length = CROP * HOP + 80  # 80 samples more, or the last frame is cut off
    batch = {
        "waveform": np.zeros((size, length), np.float32),
        "labels": np.zeros((size, CROP), np.int32),
        "masked": np.zeros((size, CROP), bool),
    }
    for row, i in enumerate(rng.integers(len(waveforms), size=size)):
        start = int(rng.integers(len(labels[i]) - CROP + 1))
        batch["waveform"][row] = waveforms[i][start * HOP : start * HOP + length]
        batch["labels"][row] = labels[i][start : start + CROP]
        starts = rng.random(CROP) < MASK_PROBABILITY
        starts[rng.integers(CROP)] = True
        batch["masked"][row] = np.convolve(starts, np.ones(MASK_FRAMES))[:CROP] > 0
    return batch


def train(
    encoder: nnx.Module,
    waveforms: list[np.ndarray],
    labels: list[np.ndarray],
    *,
    steps: int,
    batch_size: int,
    lr: float,
    seed: int,
    name: str,
) -> nnx.Module:
    """The encoder after `steps` steps of masked prediction."""
    graph, state = nnx.split((encoder, Predictor(encoder.config.hidden_size, rngs=nnx.Rngs(seed))))
    schedule = optax.warmup_cosine_decay_schedule(0.0, lr, min(200, steps // 10), steps, lr / 100)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98, weight_decay=0.01))

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def update(state, optimizer_state, batch):
        def loss_of(state):
            encoder, predictor = nnx.merge(graph, state)
            x, _ = encoder.features(batch["waveform"])
            x = jnp.where(batch["masked"][..., None], predictor.mask_embedding[...], x)
            logits = predictor(encoder.contextualise(x, None))
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"])
            masked = batch["masked"]
            right = (logits.argmax(-1) == batch["labels"]).mean(where=masked)
            return 0.5 * losses.mean(where=masked) + 0.5 * losses.mean(where=~masked), right

        (loss, right), gradients = jax.value_and_grad(loss_of, has_aux=True)(state)
        updates, optimizer_state = optimizer.update(gradients, optimizer_state, state)
        return optax.apply_updates(state, updates), optimizer_state, loss, right

    optimizer_state = optimizer.init(state)
    progress = tqdm.trange(steps, desc=name, unit="step", mininterval=1.0)
    for step in progress:
        batch = draw_batch(waveforms, labels, batch_size, np.random.default_rng([seed, step]))
        state, optimizer_state, loss, right = update(state, optimizer_state, batch)
        if step % 50 == 0 or step == steps - 1:
            progress.set_postfix(loss=f"{loss:.3f}", masked_right=f"{right:.1%}")
    return nnx.merge(graph, state)[0]


def frames_of(encoder: nnx.Module, waveforms: list[np.ndarray], layer: int) -> list[np.ndarray]:
    """The encoder's frames [T, D] of each recording, after that layer."""
    graph, state = nnx.split(encoder)
    run = jax.jit(lambda state, waveform, mask: nnx.merge(graph, state)(waveform, mask, layer=layer)[0])
    length = max(map(len, waveforms))
    frames = []
    for start in tqdm.trange(0, len(waveforms), 32, desc="frames to label"):
        some = waveforms[start : start + 32]
        waveform, mask = audio.pad([*some, *some[:1] * (32 - len(some))], length)
        out = np.asarray(run(state, waveform, mask))
        frames += [row[: encoder.config.num_frames(len(w))] for row, w in zip(out, some, strict=False)]
    return frames


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m sparqle_jax.demo.encoder", description=__doc__.split("\n")[0])
    parser.add_argument("data", type=Path, help="a data set, of which the recordings alone are read")
    parser.add_argument("folder", type=Path, help="where the model is written, as a transformers folder")
    parser.add_argument(
        "--steps", type=int, nargs=2, default=(2000, 2000), help="of the first and second round"
    )
    parser.add_argument("--batch-size", type=int, default=24)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)

    settings = TransformersHubertConfig(
        hidden_size=args.width,
        num_hidden_layers=args.layers,
        num_attention_heads=args.width // 32,
        intermediate_size=4 * args.width,
        conv_dim=(32, 32, 32, 64, 64, 64, 64),
        num_conv_pos_embeddings=32,
        num_conv_pos_embedding_groups=8,
        mask_time_prob=0.0,  # transformers else expects the mask's embedding in the file
        architectures=["HubertModel"],
    )
    config = hubert.Config.from_dict(settings.to_dict(), {"do_normalize": True})
    data = DataSet(args.data)
    numbers = range(min(len(data), RECORDINGS))
    waveforms = [data.waveform(i) for i in tqdm.tqdm(numbers, "recordings")]
    waveforms = [w for w in waveforms if config.num_frames(len(w)) >= CROP]
    features = [mfcc(w)[: config.num_frames(len(w))] for w in tqdm.tqdm(waveforms, "MFCCs")]

    encoder = hubert.Encoder(config, rngs=nnx.Rngs(args.seed))
    for number, steps in enumerate(args.steps, 1):
        if not steps:
            continue
        if number == 2:
            features = frames_of(encoder, waveforms, layer=args.layers // 2 + 1)
        encoder = train(
            encoder,
            waveforms,
            label(features, args.seed),
            steps=steps,
            batch_size=args.batch_size,
            lr=args.lr,
            seed=args.seed + number,
            name=f"HuBERT, round {number}",
        )
    pretrained.save_folder(encoder, args.folder, settings, dtype=np.float16)
    Wav2Vec2FeatureExtractor(do_normalize=True).save_pretrained(args.folder)


if __name__ == "__main__":
    main()
