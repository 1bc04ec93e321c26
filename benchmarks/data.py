"""How fast data get to the devices, beside plain decoding and PyTorch's DataLoader, in one run.

    make bench-data

Speech is synthesised once, of LibriSpeech's lengths, as flac. The same files are then decoded by soundfile in
a loop, read by a DataLoader, and, prepared, by the pipeline of training; each on all cores. The pipeline and
the DataLoader also normalise, tokenise and pad. At last, a plan for 30 million recordings of random lengths.
"""

import argparse
import json
import multiprocessing
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import soundfile
import tqdm

from sparqle_jax import audio, prompts
from sparqle_jax.data.builder import Limits, prepare
from sparqle_jax.data.dataset import Corpus, DataSet
from sparqle_jax.data.pipeline import InstructionExamples, Waveforms, batches
from sparqle_jax.data.plan import BatchPlan, choose_buckets
from sparqle_jax.data.sources import Manifest
from sparqle_jax.demo import grammar, speech
from sparqle_jax.demo.__main__ import MODELS
from sparqle_jax.llms.decoder import Config as DecoderConfig

CORES = os.cpu_count() or 1
BATCH_SIZE = 16
EPOCHS = 6  # of pipeline and DataLoader in a round, so that it takes seconds
WARM_UP = 2 * CORES  # batches before the clock starts: all workers are there
SECONDS = (1.5, 4, 7, 10, 12, 13.5, 14.5, 15.3, 16, 17)  # deciles of LibriSpeech, about


def speak(task: tuple[Path, int]) -> dict[str, str]:
    """Writes a recording of one of LibriSpeech's lengths, and returns its line of the manifest."""
    folder, number = task
    rng = np.random.default_rng(number)
    voice = speech.draw_voice(rng, speech.SEEN)
    sentences = iter(grammar.sentences(40, number, test=False))
    length = round(np.interp(rng.uniform(0, 9), range(10), SECONDS) * audio.SAMPLE_RATE)
    texts, parts = [], [np.zeros(0, np.float32)]
    while sum(map(len, parts)) < length:
        texts.append(next(sentences)["en"])
        parts.append(speech.synthesise(texts[-1], voice))
    file = folder / f"{number}.flac"
    soundfile.write(file, np.concatenate(parts)[:length], audio.SAMPLE_RATE)
    return {"audio": file.name, "text": " ".join(texts)}


def make_recordings(folder: Path, hours: float) -> None:
    """The recordings, their manifest, and the data set prepared of them; what is there stays."""
    if (folder / "data").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    tasks = [(folder, number) for number in range(round(hours * 3600 / np.mean(SECONDS)))]
    with multiprocessing.get_context("spawn").Pool(CORES) as pool:
        lines = list(tqdm.tqdm(pool.imap(speak, tasks, chunksize=8), "speech", len(tasks)))
    (folder / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    prepare(folder / "data", Manifest(str(folder / "manifest.jsonl")), Limits())


def decode(files: list[Path]) -> int:
    """Plain decoding: the number of samples in some files."""
    return sum(len(soundfile.read(file, dtype="float32")[0]) for file in files)


def time_decoding(files: list[Path]) -> Callable[[], float]:
    pool = ProcessPoolExecutor(CORES)
    list(pool.map(decode, [files[:1]] * CORES))  # they have started

    def measure() -> float:
        began = time.perf_counter()
        sum(pool.map(decode, [files[i::CORES] for i in range(CORES)]))
        return time.perf_counter() - began

    return measure


def time_batches(start: Callable[[], Iterator]) -> Callable[[], float]:
    """The time from batch WARM_UP to the last: that in which the workers start does not count."""

    def measure() -> float:
        inputs = start()
        for _ in range(WARM_UP):
            next(inputs)
        began = time.perf_counter()
        for _ in inputs:
            pass
        return time.perf_counter() - began

    return measure


def pipeline(folder: Path) -> tuple[Callable[[], Iterator], float]:
    """The pipeline of training over all batches of EPOCHS epochs, and the hours of audio that are timed."""
    corpus = Corpus([DataSet(folder / "data")])
    plan = BatchPlan(corpus.num_samples, choose_buckets(corpus.num_samples, 8), BATCH_SIZE, seed=0)
    waveforms = Waveforms(corpus, 30.0)
    vocab_size = DecoderConfig.from_dict(json.loads((MODELS / "llm/config.json").read_text())).vocab_size
    prompter = prompts.Prompter.from_folder(MODELS / "llm", vocab_size)
    examples = InstructionExamples(corpus, waveforms, prompter, vocab_size, [{"transcribe": 1.0}], plan)
    stop = EPOCHS * plan.batches_per_epoch
    rows = np.concatenate([plan.batch(number).indices for number in range(WARM_UP, stop)])
    hours = corpus.num_samples[rows].sum() / audio.SAMPLE_RATE / 3600
    return lambda: batches(examples, plan, seed=0, stop=stop, workers=CORES), hours


class Recordings:
    """What a DataLoader reads: decoded by soundfile, normalised, tokenised."""

    def __init__(self, folder: Path):
        self.folder = folder
        lines = (folder / "manifest.jsonl").read_text().splitlines()
        self.rows = [json.loads(line) for line in lines]
        self.tokenizer = prompts.load_tokenizer(MODELS / "llm")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int):
        row = self.rows[index]
        waveform, _ = soundfile.read(self.folder / row["audio"], dtype="float32")
        waveform = (waveform - waveform.mean()) / np.sqrt(waveform.var() + 1e-7)
        return waveform, self.tokenizer(row["text"]).input_ids


def collate(rows: list):
    import torch

    pad = torch.nn.utils.rnn.pad_sequence
    waveforms = [torch.from_numpy(waveform) for waveform, _ in rows]
    tokens = [torch.tensor(ids) for _, ids in rows]
    masks = [torch.ones(len(waveform), dtype=torch.bool) for waveform in waveforms]
    return pad(waveforms, batch_first=True), pad(masks, batch_first=True), pad(tokens, batch_first=True)


def data_loader(folder: Path) -> tuple[Callable[[], Iterator], float]:
    """PyTorch's DataLoader over the same recordings, sorted into batches by length as the plan does."""
    import torch

    recordings = Recordings(folder)
    lengths = DataSet(folder / "data").num_samples
    order = np.argsort(lengths, kind="stable")
    size = BATCH_SIZE * 2  # about the mean of the plan's batches
    groups = [order[i : i + size].tolist() for i in range(0, len(order), size)]
    np.random.default_rng(0).shuffle(groups)
    groups = groups * EPOCHS
    hours = lengths[np.concatenate(groups[WARM_UP:])].sum() / audio.SAMPLE_RATE / 3600

    def start() -> Iterator:
        loader = torch.utils.data.DataLoader(
            recordings, batch_sampler=groups, num_workers=CORES, collate_fn=collate
        )
        return iter(loader)

    return start, hours


def plan_of_millions(millions: int) -> None:
    """Prints the time and the memory that the plan for so many million recordings takes, in this process."""
    rng = np.random.default_rng(0)
    lengths = np.empty(millions * 1_000_000, np.int32)
    for part in np.array_split(lengths, 30):  # in parts, so that making them needs less memory than the plan
        part[:] = np.interp(rng.uniform(0, 9, len(part)), range(10), SECONDS) * audio.SAMPLE_RATE
    began = time.perf_counter()
    plan = BatchPlan(lengths, choose_buckets(lengths, 8), 64, seed=0, multiple=8)
    plan.batch(0)
    seconds = time.perf_counter() - began
    gigabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    print(
        f"plan of {millions} million recordings, its first batch: {seconds:.1f} s, {gigabytes:.2f} GB at most"
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path("data/bench"), help="of the recordings")
    parser.add_argument("--hours", type=float, default=3.0, help="of speech")
    parser.add_argument("--rounds", type=int, default=3, help="how often each is measured, in turn")
    parser.add_argument("--millions", type=int, default=30, help="of recordings to plan")
    parser.add_argument("--plan-only", action="store_true")
    args = parser.parse_args(argv)
    if args.plan_only:
        plan_of_millions(args.millions)
        return
    make_recordings(args.folder, args.hours)
    files = sorted(args.folder.glob("*.flac"))
    hours = DataSet(args.folder / "data").num_samples.sum(dtype=np.int64) / audio.SAMPLE_RATE / 3600
    runs = {"plain decoding": (time_decoding(files), hours)}
    for name, make in (("pipeline", pipeline), ("DataLoader", data_loader)):
        start, measured = make(args.folder)
        runs[name] = time_batches(start), measured
    rates: dict[str, list[float]] = {name: [] for name in runs}
    for _ in tqdm.trange(args.rounds, desc="rounds"):
        for name, (measure, measured) in runs.items():
            rates[name].append(measured / measure() / CORES)
    best = {name: max(values) for name, values in rates.items()}
    print(f"hours of audio per second and core, on {CORES} cores, best of {args.rounds}:")
    for name, rate in best.items():
        print(f"{name:>16}{rate:>8.3f}{rate / best['plain decoding']:>8.2f} of plain decoding")
    # In a process of its own, for its memory.
    command = [sys.executable, "-m", "benchmarks.data", "--plan-only", "--millions", str(args.millions)]
    subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
