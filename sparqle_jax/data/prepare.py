"""Makes a data set of recordings and texts, ready to train on.

    python -m sparqle_jax.data.prepare manifest data/mine --manifest mine.jsonl
    python -m sparqle_jax.data.prepare librispeech data/libri --subsets train-clean-100 train-clean-360
    python -m sparqle_jax.data.prepare covost2 data/covost --manual-dir cv-corpus/en --target de
    python -m sparqle_jax.data.prepare must_c data/must_c --manual-dir MUSTC/en-de --target de

The data set is a new folder (see data/dataset.py), here or on gs://. It appears only when it is whole.
A record keeps the translations that it has; --require fr de rejects those that lack one of these.
--allow-empty takes records with an empty text: recordings in which nobody speaks, to test with.
Records that can't be used are listed in its rejected.jsonl, each with the reason; when they are more than
--max-rejected of all, nothing is made but that list. The work is a Beam pipeline: on all cores here, or
with --beam "runner=DataflowRunner ..." on a cluster that reaches the same folders.
"""

import argparse
import contextlib
import logging
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from sparqle_jax import audio, quiet
from sparqle_jax.data.builder import Limits, LostRecords, prepare
from sparqle_jax.data.dataset import DataSet
from sparqle_jax.data.sources import Covost2, LibriSpeech, Manifest, MustC, Source


def download_librispeech(subsets: tuple[str, ...], folder: Path) -> str:
    """Where LibriSpeech's subsets are in `folder`, downloaded with TFDS's addresses and checksums.

    What is there already is not downloaded again. Raises ValueError for a subset that does not exist.
    """
    builder = tfds.builder_cls("librispeech")
    urls = {url.rpartition("/")[2].removesuffix(".tar.gz"): url for url in builder.url_infos}
    if unknown := set(subsets) - set(urls):
        raise ValueError(f"LibriSpeech has no {sorted(unknown)}; it has {', '.join(sorted(urls))}.")
    together = folder / "LibriSpeech"
    if absent := {subset: urls[subset] for subset in subsets if not (together / subset).is_dir()}:
        manager = tfds.download.DownloadManager(
            download_dir=folder / "downloads",
            url_infos=builder.url_infos,
            max_simultaneous_downloads=builder.MAX_SIMULTANEOUS_DOWNLOADS,
        )
        together.mkdir(parents=True, exist_ok=True)
        for subset, archive in manager.download(absent).items():
            with tempfile.TemporaryDirectory(dir=folder) as partial, tarfile.open(archive) as tar:
                tar.extractall(partial, filter="data")
                (Path(partial) / "LibriSpeech" / subset).rename(together / subset)
    return str(together)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m sparqle_jax.data.prepare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("folder", help="the data set to be made, local or gs://")
    common.add_argument("--min-seconds", type=float, default=Limits.min_seconds)
    common.add_argument("--max-seconds", type=float, default=Limits.max_seconds)
    common.add_argument(
        "--max-rejected", type=float, default=Limits.max_rejected, help="a share of all records"
    )
    common.add_argument("--require", nargs="+", default=[], metavar="CODE", help="translations to be there")
    common.add_argument(
        "--allow-empty", action="store_true", help="an empty text: nobody speaks; the recording may be silent"
    )
    common.add_argument("--beam", default="", metavar="OPTIONS", help='such as "runner=DataflowRunner ..."')
    sources = parser.add_subparsers(dest="source", required=True, metavar="SOURCE")

    one = sources.add_parser(
        "manifest", parents=[common], help="your own JSONL, TSV or CSV; NeMo's; fairseq's"
    )
    one.add_argument(
        "--manifest", required=True, help=".jsonl, .tsv or .csv; paths are relative to its folder"
    )
    one.add_argument("--language", default="en", help="of the speech, where the manifest says none")
    one.add_argument("--translations", nargs="*", metavar="CODE", help="to take; else all that occur")

    one = sources.add_parser("librispeech", parents=[common], help="downloaded by TFDS, or from --manual-dir")
    one.add_argument("--subsets", nargs="+", default=["train-clean-100"], metavar="SUBSET")
    one.add_argument("--manual-dir", help="the folder LibriSpeech/ that is there already")
    one.add_argument("--download-dir", type=Path, default=Path("data/downloads"))

    for name, help in (
        ("covost2", "Common Voice's folder with CoVoST's tsv in it"),
        ("must_c", "MuST-C's en-XX"),
    ):
        one = sources.add_parser(name, parents=[common], help=help)
        one.add_argument("--manual-dir", required=True, help="where the data set was unpacked")
        one.add_argument("--source", dest="spoken", default="en", help="the language spoken")
        one.add_argument("--target", required=True, help="the language of the translations")
        one.add_argument("--split", default="train")
    return parser


def _source(args: argparse.Namespace) -> Source:
    if args.source == "manifest":
        wanted = None if args.translations is None else tuple(args.translations)
        return Manifest(args.manifest, args.language, wanted)
    if args.source == "librispeech":
        subsets = tuple(args.subsets)
        return LibriSpeech(args.manual_dir or download_librispeech(subsets, args.download_dir), subsets)
    kind: Any = {"covost2": Covost2, "must_c": MustC}[args.source]
    return kind(args.manual_dir, args.spoken, args.target, args.split)


def main(argv: list[str] | None = None) -> int:
    parser = _parser()
    args = parser.parse_args(argv)
    limits = Limits(
        args.min_seconds, args.max_seconds, args.max_rejected, tuple(args.require), args.allow_empty
    )
    if not args.beam:  # on a cluster, what Beam has to say is all that there is to see
        for name in ("apache_beam", "root", "absl"):
            logging.getLogger(name).setLevel(logging.ERROR)
    quieter = contextlib.nullcontext() if args.beam else quiet.processes_without(quiet.BEAM)
    try:
        with quieter:
            prepare(args.folder, _source(args), limits, args.beam)
    except (ValueError, FileNotFoundError, FileExistsError) as error:
        parser.error(str(error))
    except LostRecords as error:
        print(
            f"{args.folder} was not made: {error}. That is a mistake in this program: please report it, with "
            "the lines around the first that is lost.",
            file=sys.stderr,
        )
        return 1
    data = DataSet(args.folder)
    hours = data.num_samples.sum(dtype=np.int64) / audio.SAMPLE_RATE / 3600
    print(f"{args.folder}: {len(data)} utterances, {hours:.2f} hours")
    if silent := int((~data.has_speech).sum()):
        print(f"{silent:>9} in which nobody speaks")
    for code in data.languages:
        print(f"{int(data.has(code).sum()):>9} with a translation into {code}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
