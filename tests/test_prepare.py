"""Data sets from every kind of source: what goes in comes out, and what can't be used is named."""

import csv
import dataclasses
import hashlib
import http.server
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr

from sparqle_jax import audio
from sparqle_jax.data import builder, prepare
from sparqle_jax.data.dataset import Corpus, DataSet
from sparqle_jax.data.sources import (
    Covost2,
    LibriSpeech,
    Manifest,
    MustC,
    Record,
    Rejection,
    Source,
    checked,
)
from sparqle_jax.demo.speech import Voice, synthesise

SENTENCES = [
    ("the train leaves at seven", "der zug fährt um sieben"),
    ("it is ten degrees in paris", "es sind zehn grad in paris"),
    ("„quoted“ and, with commas", 'mit "zeichen", ja'),
    ("the concert is on friday", "das konzert ist am freitag"),
]
ONE_PROCESS = ["--beam", "runner=DirectRunner"]


@pytest.fixture(scope="module")
def spoken() -> list[np.ndarray]:
    """The sentences as int16 [S] at 16 kHz."""
    waveforms = [synthesise(text, Voice(rate=220)) for text, _ in SENTENCES]
    return [np.round(waveform * 32767).astype(np.int16) for waveform in waveforms]


def write(file: Path, samples: np.ndarray, rate: int = 16_000, **kwargs) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(file, samples, rate, **kwargs)


def lines(file: Path, rows) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")


def made(folder: Path, *arguments: object) -> DataSet:
    source, *rest = map(str, arguments)
    assert prepare.main([source, str(folder), *rest, *ONE_PROCESS]) == 0
    return DataSet(folder)


def assert_holds(data: DataSet, samples, *, german: bool = True) -> None:
    """The data set holds the sentences in their order, and their audio bit by bit."""
    assert [u.text for u in data] == [text for text, _ in SENTENCES]
    assert [u.translations for u in data] == [{"de": text} if german else {} for _, text in SENTENCES]
    assert len({u.id for u in data}) == len(SENTENCES)
    for i, expected in enumerate(samples):
        np.testing.assert_array_equal(np.round(data.waveform(i) * 32768).astype(np.int16), expected)
        assert data[i].num_samples == data.num_samples[i] == len(expected)
        assert data[i].duration == pytest.approx(len(expected) / 16_000)


def test_librispeech(spoken, tmp_path):
    folder = tmp_path / "LibriSpeech"
    for i, samples in enumerate(spoken):
        write(folder / "train-clean-100/19/198" / f"19-198-000{i}.flac", samples)
    lines(
        folder / "train-clean-100/19/198/19-198.trans.txt",
        [f"19-198-000{i} {text}" for i, (text, _) in enumerate(SENTENCES)],
    )
    data = made(tmp_path / "out", "librispeech", "--manual-dir", folder, "--subsets", "train-clean-100")
    assert_holds(data, spoken, german=False)
    assert [u.speaker for u in data] == ["19"] * 4
    assert data[1].id == "19-198-0001"


def test_librispeech_is_downloaded_by_tfds(spoken, tmp_path, monkeypatch):
    """Everything but the address is TFDS's."""
    served, kind = tmp_path / "served", prepare.tfds.builder_cls("librispeech")
    write(served / "LibriSpeech/dev-clean/19/198/19-198-0000.flac", spoken[0])
    lines(served / "LibriSpeech/dev-clean/19/198/19-198.trans.txt", [f"19-198-0000 {SENTENCES[0][0]}"])
    archive = served / "dev-clean.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(served / "LibriSpeech", "LibriSpeech")
    assert "http://www.openslr.org/resources/12/train-clean-100.tar.gz" in kind.url_infos
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), partial(http.server.SimpleHTTPRequestHandler, directory=served)
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/dev-clean.tar.gz"
    info = dataclasses.replace(
        next(iter(kind.url_infos.values())),
        size=archive.stat().st_size,
        checksum=hashlib.sha256(archive.read_bytes()).hexdigest(),
    )
    monkeypatch.setattr(kind, "url_infos", {url: info})
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    arguments = ["--subsets", "dev-clean", "--download-dir", tmp_path / "downloads"]
    data = made(tmp_path / "out", "librispeech", *arguments)
    assert data[0].text == SENTENCES[0][0]
    server.shutdown()
    made(tmp_path / "again", "librispeech", *arguments)  # what is there is not downloaded again
    with pytest.raises(ValueError, match=r"LibriSpeech has no \['train'\]; it has dev-clean"):
        prepare.download_librispeech(("train",), tmp_path)


def test_covost2(spoken, tmp_path):
    decoded = []
    for i, samples in enumerate(spoken):
        file = tmp_path / "cv/clips" / f"common_voice_en_{i}.mp3"
        write(file, soxr.resample(samples / 32768, 16_000, 48_000), 48_000)
        decoded.append(np.round(audio.read(file) * 32768).astype(np.int16))
    header = "client_id\tpath\tsentence\tup_votes"
    rows = [f"speaker{i}\tcommon_voice_en_{i}.mp3\t{text}\t2" for i, (text, _) in enumerate(SENTENCES)]
    lines(tmp_path / "cv/validated.tsv", [header, *rows, "x\tother.mp3\tin no split\t2"])
    rows = [f"common_voice_en_{i}.mp3\t{text}\ttrain" for i, (_, text) in enumerate(SENTENCES)]
    rows[1] = rows[1].replace("\ttrain", "\ttrain_covost")
    lines(tmp_path / "cv/covost_v2.en_de.tsv", ["path\ttranslation\tsplit", *rows, "other.mp3\tx\tdev"])
    data = made(tmp_path / "out", "covost2", "--manual-dir", tmp_path / "cv", "--target", "de")
    assert_holds(data, decoded)
    assert [u.speaker for u in data] == ["speaker0", "speaker1", "speaker2", "speaker3"]
    assert data.languages == ("de",)


def test_must_c(spoken, tmp_path):
    folder, pause = tmp_path / "en-de/data/train", np.zeros(8000, np.int16)
    write(folder / "wav/ted_1.wav", np.concatenate([pause, spoken[0], pause, spoken[1]]))
    write(folder / "wav/ted_2.wav", np.concatenate([spoken[2], pause, spoken[3], pause]))
    segments, place = [], 0
    for i, samples in enumerate(spoken):
        place = [8000, place + 8000, 0, place + 8000][i]
        segments.append(
            f"- {{duration: {len(samples) / 16_000:.6f}, offset: {place / 16_000:.6f}, rW: 9, uW: 0, "
            f"speaker_id: spk.{i // 2}, wav: ted_{i // 2 + 1}.wav}}"
        )
        place += len(samples)
    lines(folder / "txt/train.yaml", segments)
    lines(folder / "txt/train.en", [text for text, _ in SENTENCES])
    lines(folder / "txt/train.de", [text for _, text in SENTENCES])
    data = made(tmp_path / "out", "must_c", "--manual-dir", tmp_path / "en-de", "--target", "de")
    assert_holds(data, spoken)
    assert [u.id for u in data] == ["ted_1_0", "ted_1_1", "ted_2_2", "ted_2_3"]
    assert data[3].speaker == "spk.1"

    lines(folder / "txt/train.de", ["eins"])
    with pytest.raises(SystemExit):
        made(tmp_path / "more", "must_c", "--manual-dir", tmp_path / "en-de", "--target", "de")


def manifest_rows() -> list[dict]:
    return [
        {"audio": f"a/{i}.flac", "text": text, "speaker": "anna", "translations": {"de": german}}
        for i, (text, german) in enumerate(SENTENCES)
    ]


def test_jsonl_of_ones_own(spoken, tmp_path):
    for i, samples in enumerate(spoken):
        write(tmp_path / f"a/{i}.flac", samples)
    lines(tmp_path / "m.jsonl", map(json.dumps, manifest_rows()))
    data = made(tmp_path / "out", "manifest", "--manifest", tmp_path / "m.jsonl")
    assert_holds(data, spoken)
    assert (data[0].id, data[0].speaker, data[0].language) == ("a/0.flac", "anna", "en")
    without = made(tmp_path / "w", "manifest", "--manifest", tmp_path / "m.jsonl", "--translations")
    assert_holds(without, spoken, german=False)


def test_nemos_jsonl_with_parts_of_recordings(spoken, tmp_path):
    write(tmp_path / "all.wav", np.concatenate(spoken))
    starts = np.cumsum([0, *map(len, spoken)])
    rows = [
        {"audio_filepath": "all.wav", "offset": start / 16_000, "duration": len(part) / 16_000, "text": text}
        | {"lang": "en", "pred_text": "ignored"}
        for start, part, (text, _) in zip(starts[:-1].tolist(), spoken, SENTENCES, strict=True)
    ]
    lines(tmp_path / "m.json", map(json.dumps, rows))
    assert_holds(made(tmp_path / "out", "manifest", "--manifest", tmp_path / "m.json"), spoken, german=False)


@pytest.mark.parametrize(("suffix", "dialect"), [("csv", "excel"), ("tsv", "excel-tab")])
def test_tables(suffix, dialect, spoken, tmp_path):
    for i, samples in enumerate(spoken):
        write(tmp_path / f"a/{i}.wav", samples)
    quoting = csv.QUOTE_NONE if suffix == "tsv" else csv.QUOTE_MINIMAL
    with open(tmp_path / f"m.{suffix}", "w", newline="", encoding="utf-8-sig") as file:
        writer = csv.writer(file, dialect, quoting=quoting, quotechar=None if suffix == "tsv" else '"')
        writer.writerow(["id", "audio", "text", "translation_de", "duration"])
        for i, (text, german) in enumerate(SENTENCES):
            writer.writerow([f"u{i}", f"a/{i}.wav", text, german, len(spoken[i]) / 16_000])
    data = made(tmp_path / "out", "manifest", "--manifest", tmp_path / f"m.{suffix}")
    assert_holds(data, spoken)
    assert data[2].id == "u2"


def test_the_references_tsv_and_txt(spoken, tmp_path):
    for i, samples in enumerate(spoken):
        write(tmp_path / f"root/{i}.wav", samples)
    rows = [f"{i}.wav\t{len(samples)}\ttranscription" for i, samples in enumerate(spoken)]
    lines(tmp_path / "train.tsv", [tmp_path / "root", *rows])
    lines(tmp_path / "train.txt", [text for text, _ in SENTENCES])
    data = made(tmp_path / "out", "manifest", "--manifest", tmp_path / "train.tsv")
    assert_holds(data, spoken, german=False)


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("a.wav", {}),
        ("a.flac", {}),
        ("a.mp3", {}),
        ("a.ogg", {}),
        ("a.opus", dict(format="OGG", subtype="OPUS")),
    ],
)
def test_any_format_rate_and_channels(name, kwargs, spoken, tmp_path):
    for rate, channels in ((8_000, 1), (48_000, 3)):
        if channels > 2 and name in ("a.mp3", "a.opus"):
            channels = 2
        waveform = np.repeat(soxr.resample(spoken[0] / 32768, 16_000, rate)[:, None], channels, 1)
        folder = tmp_path / f"{rate}"
        write(folder / name, waveform, rate, **kwargs)
        lines(folder / "m.jsonl", [json.dumps({"audio": name, "text": "x"})])
        waveform = made(folder / "out", "manifest", "--manifest", folder / "m.jsonl").waveform(0)
        assert len(waveform) == pytest.approx(len(spoken[0]), abs=1600)
        # Heard the same, shifted by what the format adds in front.
        n = len(waveform) + len(spoken[0])
        product = np.fft.irfft(np.fft.rfft(waveform, n) * np.fft.rfft(spoken[0] / 32768, n).conj(), n)
        scale = np.linalg.norm(waveform) * np.linalg.norm(spoken[0] / 32768)
        assert product.max() / scale > 0.9


def broken(folder: Path, samples: np.ndarray) -> dict[str, tuple[str | bytes, str]]:
    """Lines of a manifest by what is wrong with them, each with the reason that is to be given."""
    write(folder / "good.wav", samples)
    write(folder / "good.flac", samples)
    write(folder / "good.mp3", samples)
    for name in ("good.wav", "good.flac", "good.mp3"):
        data = (folder / name).read_bytes()
        (folder / f"cut.{name[-4:].strip('.')}").write_bytes(data[: len(data) // 2])
    (folder / "empty.wav").write_bytes(b"")
    (folder / "text.wav").write_bytes(b"this is no recording at all")
    (folder / "folder.wav").mkdir()
    write(folder / "none.wav", samples[:0])
    write(folder / "silent.wav", samples * 0)
    write(folder / "quiet.wav", samples / 32768 * 1e-5, subtype="FLOAT")
    write(folder / "nan.wav", np.full(16_000, np.nan), subtype="FLOAT")
    write(folder / "short.wav", samples[:800])
    write(folder / "long.wav", np.resize(samples, 31 * 16_000))
    (folder / "odd.raw").write_bytes(bytes(1000))
    content = bytearray((folder / "good.flac").read_bytes())
    content[21] &= 0xF0  # the 36 bits of STREAMINFO's number of samples
    content[22:26] = bytes(4)
    (folder / "piped.flac").write_bytes(content)

    def line(**changes) -> str:
        row = {"audio": "good.wav", "text": "good", "translations": {"de": "gut"}} | changes
        return json.dumps({name: value for name, value in row.items() if value is not None})

    return {
        "not json": ('{"audio": "good.wav", "text": ', "not JSON"),
        "a list": ('["good.wav"]', "not JSON"),
        "latin-1": ('{"audio": "good.wav", "text": "é"}'.encode("latin-1"), "text is not UTF-8"),
        "of a language in latin-1": (
            line(language="LANGUAGE").replace("LANGUAGE", "fran\xe7ais").encode("latin-1"),
            "text is not UTF-8",
        ),
        "a translation for a transcript": (line(source_lang="en", target_lang="de"), "no transcript"),
        "without audio": (line(audio=None), "no audio"),
        "with empty audio": (line(audio=""), "no audio"),
        "without text": (line(text=None), "no text"),
        "with empty text": (line(text=" \t"), "no text"),
        "with a number for text": (line(text=3), "wrong value"),
        "without translation": (line(translations=None), "no translation into de"),
        "with empty translation": (line(translations={"de": ""}), "no translation into de"),
        "with translations as text": (line(translations="gut"), "wrong value"),
        "with an id that is there": (line(id="first"), "duplicate id"),
        "with a duration in words": (line(duration="long"), "wrong value"),
        "with a negative offset": (line(offset=-1.0, duration=0.5), "wrong value"),
        "missing": (line(audio="nowhere.wav"), "no such file"),
        "a folder": (line(audio="folder.wav"), "unreadable"),
        "of no bytes": (line(audio="empty.wav"), "unreadable"),
        "text named wav": (line(audio="text.wav"), "unreadable"),
        "a flac of unknown length": (line(audio="piped.flac"), "unreadable"),
        "raw": (line(audio="odd.raw"), "unreadable"),
        "a wav cut short": (line(audio="cut.wav"), "cut short"),
        "a flac cut short": (line(audio="cut.flac"), "unreadable"),
        "an mp3 cut short": (line(audio="cut.mp3"), "cut short"),
        "of no samples": (line(audio="none.wav"), "empty"),
        "silent": (line(audio="silent.wav"), "silent"),
        "too quiet for 16 bits": (line(audio="quiet.wav"), "silent"),
        "not a number": (line(audio="nan.wav"), "not finite"),
        "too short": (line(audio="short.wav"), "too short"),
        "too long": (line(audio="long.wav"), "too long"),
        "of another length than declared": (line(duration=9.0), "not as long as declared"),
        "a part beyond the end": (line(offset=100.0, duration=1.0), "cut short"),
    }


def test_what_can_not_be_used_is_listed_with_its_reason(spoken, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path / "without ffmpeg"))
    cases = broken(tmp_path, spoken[0])
    rows = [json.dumps({"id": "first", "audio": "good.wav", "text": "good", "translations": {"de": "gut"}})]
    # Each has an id of its own, so that it is rejected for its own reason.
    for number, (row, _) in enumerate(cases.values()):
        if isinstance(row, str) and row.startswith("{") and row.endswith("}") and '"id"' not in row:
            row = json.dumps({"id": f"u{number}", **json.loads(row)})
        rows.append(row)
    text = b"".join((row.encode() if isinstance(row, str) else row) + b"\n" for row in rows)
    (tmp_path / "m.jsonl").write_bytes(text)

    arguments = ["manifest", str(tmp_path / "out"), "--manifest", str(tmp_path / "m.jsonl"), *ONE_PROCESS]
    arguments += ["--require", "de"]
    with pytest.raises(SystemExit):
        prepare.main(arguments)
    assert not (tmp_path / "out").exists()
    assert re.search(
        r"33 of 34 records can't be used, more than --max-rejected=0.01", capsys.readouterr().err
    )
    listed = (tmp_path / "out.rejected.jsonl").read_text()

    assert prepare.main([*arguments, "--max-rejected", "1"]) == 0
    assert len(DataSet(tmp_path / "out")) == 1
    assert (tmp_path / "out/rejected.jsonl").read_text() == listed
    reasons = {}
    for rejection in map(json.loads, listed.splitlines()):
        assert rejection["line"] not in reasons  # once
        reasons[rejection["line"]] = rejection["reason"]
    names = list(cases)
    found = {names[int(line.removeprefix("m.jsonl:")) - 2]: reason for line, reason in reasons.items()}
    assert found == {name: reason for name, (_, reason) in cases.items()}
    assert len(cases) >= 20
    printed = capsys.readouterr().out
    assert "rejected: cut short" in printed
    assert re.search(r"34 records\n\s+1 usable", printed)


def test_channels_that_cancel_and_joined_recordings(spoken, tmp_path, capsys):
    """The former are counted, the latter are whole."""
    for i, samples in enumerate(spoken):
        write(tmp_path / f"a/{i}.flac", np.stack([samples, -samples], 1) if i % 2 else samples)
    joined = tmp_path / "a/0.flac"
    joined.write_bytes(joined.read_bytes() * 2)
    lines(tmp_path / "m.jsonl", map(json.dumps, manifest_rows()))
    data = made(tmp_path / "out", "manifest", "--manifest", tmp_path / "m.jsonl")
    assert_holds(data, [np.tile(spoken[0], 2), *spoken[1:]])
    assert "2 usable, but: channels cancel each other: the loudest is taken\n" in capsys.readouterr().out
    assert not list((tmp_path / "out").glob("warnings*"))


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("m.tsv", "audio\ttext\ngood.wav\n", "wrong number of columns"),
        ("m.csv", "audio,text\ngood.wav,good,more\n", "wrong number of columns"),
        ("m.csv", "audio,text,duration\ngood.wav,good,long\n", "wrong value"),
        ("m.csv", "file,text\ngood.wav,good\n", "no audio"),
        ("m.csv", "audio,text,offset\ngood.wav,good,-1\n", "wrong value"),
        ("m.tsv", "ROOT\ngood.wav\tmany\ttranscription\n", "wrong value"),
        ("m.tsv", "ROOT\ngood.wav\t30000\ttranslation\n", "no transcript"),
        ("m.tsv", "ROOT\ngood.wav\t30000\ttranscription\ngood.wav\t3\ttranscription\n", "no text"),
        ("m.tsv", "audio\ttext\ngood.wav\tgood\t\n", "wrong number of columns"),
        ("m.tsv", "audio\ttext\ngood.wav\tgo\rod\n", "control character"),
        ("m.tsv", "audio\ttext\ngood.wav\tgo\0od\n", "control character"),
        ("m.csv", "audio,text\ngood.wav,go\rod\n", "control character"),
    ],
)
def test_rows_of_tables_that_can_not_be_used(name, text, reason, spoken, tmp_path):
    write(tmp_path / "good.wav", spoken[0])
    (tmp_path / name).write_text(text.replace("ROOT", str(tmp_path)).replace("30000", str(len(spoken[0]))))
    (tmp_path / "m.txt").write_text("good\n")
    with pytest.raises(SystemExit):
        made(tmp_path / "out", "manifest", "--manifest", tmp_path / name)
    rejections = [json.loads(line) for line in (tmp_path / "out.rejected.jsonl").read_text().splitlines()]
    assert rejections[-1]["reason"] == reason


def test_rows_of_covost_that_can_not_be_used(spoken, tmp_path):
    write(tmp_path / "cv/clips/a.mp3", spoken[0])
    lines(tmp_path / "cv/validated.tsv", ["client_id\tpath\tsentence", 'x\ta.mp3\t"a'])
    rows = ["path\ttranslation\tsplit", 'a.mp3\tsagte \\"b\\"\ttrain', "b.mp3\tc\ttrain", "c.mp3\td"]
    lines(tmp_path / "cv/covost_v2.en_de.tsv", rows)
    arguments = ["covost2", "--manual-dir", tmp_path / "cv", "--target", "de", "--max-rejected", "0.7"]
    (only,) = made(tmp_path / "out", *arguments)
    assert (only.text, only.translations["de"]) == ('"a', 'sagte "b"')
    rejected = map(json.loads, (tmp_path / "out/rejected.jsonl").read_text().splitlines())
    assert [r["reason"] for r in rejected] == ["not in validated.tsv", "wrong number of columns"]


# Each file with what becomes of its rows: the texts, and how many are rejected. All name one recording.
ROWS = {
    "an opening and a closing mark in TSV": (
        "m.tsv",
        'audio\ttext\na.wav\t"hello there\na.wav\tsecond\na.wav\tthird said bye"\na.wav\tfourth\n',
        ['"hello there', "second", 'third said bye"', "fourth"],
        0,
    ),
    "marks that Excel has written into TSV": (
        "m.tsv",
        'audio\ttext\na.wav\t"a ""b"""\na.wav\t"\na.wav\t""\n',
        ['"a ""b"""', '"', '""'],
        0,
    ),
    "line feeds of Windows, a mark of UTF-8, an empty line, no end": (
        "m.tsv",
        "\ufeffaudio\ttext\r\na.wav\tone\r\n\r\n\t\r\na.wav\ttwo",
        ["one", "two"],
        0,
    ),
    "what only Unicode takes for the end of a line": (
        "m.tsv",
        "audio\ttext\na.wav\tone\u2028two\x85three\x0bfour\x1cfive\n",
        ["one\u2028two\x85three\x0bfour\x1cfive"],
        0,
    ),
    "too many and too few columns": (
        "m.tsv",
        "audio\ttext\na.wav\tone\ta.wav\na.wav\na.wav\ttwo\t\na.wav\tthree\n",
        ["three"],
        3,
    ),
    "backslashes": ("m.tsv", "audio\ttext\na.wav\tone\\\na.wav\t\\two\n", ["one\\", "\\two"], 0),
    "quoted commas, marks and line breaks in CSV": (
        "m.csv",
        'audio,text,speaker\r\na.wav,"one, ""two""",1\r\n"a.wav","three\nfour",2\r\n\r\na.wav,five,3\r\n',
        ['one, "two"', "three\nfour", "five"],
        0,
    ),
    "wrong numbers of columns in CSV": ("m.csv", "audio,text\na.wav,one,\na.wav\na.wav,two\n", ["two"], 2),
    "JSON": (
        "m.jsonl",
        '{"audio": "a.wav", "text": "one\\n\\"two"}\n\n \t\n{"audio": "a.wav", "text": "a\u2028b"}\n[]\n"',
        ['one\n"two', "a\u2028b"],
        2,
    ),
    "the reference's pair": (
        "m.tsv",
        "ROOT\na.wav\tLENGTH\ttranscription\na.wav\tLENGTH\ttranscription\na.wav\tx\n\n",
        ['"one', 'two"'],
        1,
    ),
}


@pytest.mark.parametrize("case", ROWS)
def test_every_row_is_a_record_or_rejected(case, spoken, tmp_path, capsys):
    name, text, expected, rejected = ROWS[case]
    write(tmp_path / "a.wav", spoken[0])
    text = text.replace("ROOT", str(tmp_path)).replace("LENGTH", str(len(spoken[0])))
    (tmp_path / name).write_bytes(text.encode())
    (tmp_path / "m.txt").write_text('"one\ntwo"\nthree\n')
    source = Manifest(str(tmp_path / name))
    listed = list(source.records())
    assert [record.text for record in listed if isinstance(record, Record)] == expected
    assert source.count_rows() == len(listed) == len(expected) + rejected
    for row in listed:
        if isinstance(row, Rejection):
            number = int(row.line.removeprefix(f"{name}:"))
            assert text.split("\n")[number - 1].strip()
    # The ids are the same: but for the first they are rejected, and counted.
    made(tmp_path / "out", "manifest", "--manifest", tmp_path / name, "--max-rejected", "1")
    assert re.search(rf"^ +{len(listed)} records\n +1 usable$", capsys.readouterr().out, re.M)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (['1,a.wav,"hello', "2,a.wav,hi", "3,a.wav,yes"], "line 2: a quotation mark is not closed"),
        (["1,a.wav,one", '2,a.wav,5" and 6" disks'], "line 3: a stray quotation mark"),
        (["1,a.wav,one", '2,a.wav,"two" he said'], "line 3: a stray quotation mark"),
        (['1,a.wav, "one"'], "line 2: a stray quotation mark"),
        (['1,a.wav,"one', "2,a.wav,two", '3,a.wav,"three'], "line 2 to 4: a stray quotation mark"),
        (['1,a.wav,"one', '2,a.wav,two"', "3,a.wav,three"], "line 2 to 3: a quoted field has in it"),
    ],
)
def test_a_stray_quotation_mark_in_csv_swallows_no_rows(rows, message, spoken, tmp_path, capsys):
    write(tmp_path / "a.wav", spoken[0])
    lines(tmp_path / "m.csv", ["id,audio,text", *rows])
    with pytest.raises(SystemExit):
        made(tmp_path / "out", "manifest", "--manifest", tmp_path / "m.csv")
    assert f"m.csv, {message}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("audio\ttext\na.wav\tone\n".encode("utf-16"), "is UTF-16: save it as UTF-8"),
        (b"audio\ttext\ra.wav\tone\r", "end with carriage returns alone"),
        (b"audio\ttext\ttext\na.wav\tone\ttwo\n", r"has the columns ['text'] twice"),
    ],
)
def test_a_table_that_is_none_is_said(content, message, tmp_path, capsys):
    (tmp_path / "m.tsv").write_bytes(content)
    with pytest.raises(SystemExit):
        made(tmp_path / "out", "manifest", "--manifest", tmp_path / "m.tsv")
    assert message in capsys.readouterr().err


def sources(folder: Path, samples: np.ndarray) -> dict[str, Source]:
    """A source of each kind, with 4 or 5 rows, of which one can't be used."""
    write(folder / "libri/dev/19/198/19-198-0000.flac", samples)
    lines(folder / "libri/dev/19/198/19-198.trans.txt", ["19-198-0000 one", "", "19-1 two", "19-2", "19-3 x"])
    lines(folder / "cv/validated.tsv", ["path\tsentence", *(f'{i}.mp3\t"text {i}' for i in range(4))])
    rows = [f'{i}.mp3\t"text\t{"train_covost" if i else "train"}' for i in range(5)]
    lines(folder / "cv/covost_v2.en_de.tsv", ["path\ttranslation\tsplit", *rows, "5.mp3\ttext\tdev"])
    lines(folder / "must_c/data/train/txt/train.yaml", [f"- {{wav: {i}.wav, offset: 0}}" for i in range(4)])
    for code in ("en", "de"):
        lines(folder / f"must_c/data/train/txt/train.{code}", ["one", "", '"three', "four"])
    lines(folder / "m.tsv", ["audio\ttext", *(f'{i}.wav\t"{i}' for i in range(3)), "3.wav"])
    lines(folder / "m.csv", ["audio,text", *(f'{i}.wav,"{i}\n{i}"' for i in range(3)), "3.wav"])
    rows = [{"audio": f"{i}.wav", "text": str(i)} for i in range(3)]
    lines(folder / "m.jsonl", [*map(json.dumps, rows), "{"])
    lines(folder / "pair.tsv", [folder, *(f"{i}.wav\t1" for i in range(3)), "3.wav\tx"])
    lines(folder / "pair.txt", map(str, range(4)))
    return {
        "librispeech": LibriSpeech(str(folder / "libri"), ("dev",)),
        "covost2": Covost2(str(folder / "cv"), "en", "de", "train"),
        "must_c": MustC(str(folder / "must_c"), "en", "de", "train"),
        **{name: Manifest(str(folder / name)) for name in ("m.tsv", "m.csv", "m.jsonl", "pair.tsv")},
    }


@pytest.mark.parametrize(
    "kind", ["librispeech", "covost2", "must_c", "m.tsv", "m.csv", "m.jsonl", "pair.tsv"]
)
def test_rows_are_counted_apart_and_a_record_that_is_lost_is_noticed(kind, spoken, tmp_path, capsys):
    source = sources(tmp_path, spoken[0])[kind]
    listed = list(checked(source.records(), source.languages))
    assert source.count_rows() == len(listed) == (5 if kind == "covost2" else 4)
    assert sum(isinstance(row, Rejection) for row in listed) == 1

    class Swallowing(type(source)):
        def records(self):
            rows = list(super().records())
            yield from rows[:1] + rows[2:]

    swallowing = Swallowing(**{f.name: getattr(source, f.name) for f in dataclasses.fields(source)})
    with pytest.raises(builder.LostRecords, match=r"has [45] rows, but [234] records and [01] rejections"):
        builder.prepare(tmp_path / "out", swallowing, builder.Limits(), "runner=DirectRunner")
    assert not (tmp_path / "out").exists()


def test_records_that_are_lost_on_the_way_are_noticed_too(spoken, tmp_path, capsys, monkeypatch):
    write(tmp_path / "a.wav", spoken[0])
    rows = [json.dumps({"id": str(i), "audio": "a.wav", "text": "x"}) for i in range(3)]
    lines(tmp_path / "m.jsonl", rows)
    records = builder.WriteShard._records
    monkeypatch.setattr(builder.WriteShard, "_records", lambda self, shard: list(records(self, shard))[1:])
    arguments = ["manifest", str(tmp_path / "out"), "--manifest", str(tmp_path / "m.jsonl"), *ONE_PROCESS]
    assert prepare.main(arguments) == 1
    said = capsys.readouterr().err
    assert "of 3 records 2 were written and 0 rejected, which is not all" in said
    assert "please report it" in said
    assert not (tmp_path / "out").exists()


def sparse_rows(folder: Path, spoken) -> list[dict]:
    """German for the first two, French for the second and the third, for the last neither."""
    rows = []
    for i, (text, german) in enumerate(SENTENCES):
        write(folder / f"{i}.wav", spoken[i])
        translations = {"de": german if i < 2 else None, "fr": f"phrase {i}" if i in (1, 2) else ""}
        rows.append({"audio": f"{i}.wav", "text": text, "translations": translations})
    return rows


@pytest.mark.parametrize("form", ["jsonl", "tsv"])
def test_a_record_keeps_the_translations_that_it_has(form, spoken, tmp_path, capsys):
    rows = sparse_rows(tmp_path, spoken)
    if form == "jsonl":
        lines(tmp_path / "m.jsonl", map(json.dumps, rows))
    else:
        cells = [[r["audio"], r["text"], *(r["translations"][c] or "" for c in ("fr", "de"))] for r in rows]
        lines(
            tmp_path / "m.tsv",
            map("\t".join, [["audio", "text", "translation_fr", "translation_de"], *cells]),
        )
    manifest = tmp_path / f"m.{form}"
    data = made(tmp_path / "out", "manifest", "--manifest", manifest)
    german, french = [text for _, text in SENTENCES], [f"phrase {i}" for i in range(4)]
    expected = [{"de": german[0]}, {"de": german[1], "fr": french[1]}, {"fr": french[2]}, {}]
    assert [u.translations for u in data] == expected
    assert data.languages == ("de", "fr")
    printed = capsys.readouterr().out
    assert "4 usable" in printed
    assert re.search(r"2 with a translation into de\n +2 with a translation into fr", printed)

    both = ["--require", "fr", "de", "--max-rejected", "1"]
    (only,) = made(tmp_path / "both", "manifest", "--manifest", manifest, *both)
    assert only.text == SENTENCES[1][0]
    printed = capsys.readouterr().out
    assert "2 rejected: no translation into fr" in printed
    assert "1 rejected: no translation into de" in printed
    taken = made(tmp_path / "de", "manifest", "--manifest", manifest, "--translations", "de")
    assert [u.translations for u in taken] == [{"de": text} for text in german[:2]] + [{}, {}]


def test_an_empty_text_says_that_nobody_speaks_where_that_is_allowed(spoken, tmp_path, capsys):
    noise = np.random.default_rng(0).integers(-3000, 3000, 16_000).astype(np.int16)
    waveforms = {"speech": spoken[0], "silence": np.zeros(16_000, np.int16), "noise": noise}
    waveforms["dither"] = (noise % 6).astype(np.int16)
    for name, samples in waveforms.items():
        write(tmp_path / f"{name}.wav", samples)
    rows = [{"audio": "speech.wav", "text": "hello", "translations": {"de": "hallo"}}]
    rows += [{"audio": f"{name}.wav", "text": " "} for name in ("silence", "noise", "dither")]
    wrong = [
        {"id": "a", "audio": "silence.wav", "text": "hello"},
        {"id": "b", "audio": "noise.wav"},
        {"id": "c", "audio": "noise.wav", "text": "", "translations": {"de": "hallo"}},
    ]
    lines(tmp_path / "m.jsonl", map(json.dumps, [*rows, *wrong]))
    options = ["--manifest", tmp_path / "m.jsonl", "--max-rejected", "1"]
    assert [u.text for u in made(tmp_path / "without", "manifest", *options)] == ["hello"]
    capsys.readouterr()
    data = made(tmp_path / "out", "manifest", *options, "--allow-empty", "--require", "de")
    assert [(u.text, u.translations) for u in data] == [("hello", {"de": "hallo"}), *[("", {})] * 3]
    for i, samples in enumerate(waveforms.values()):
        np.testing.assert_array_equal(data.samples(i), samples)
    assert "3 in which nobody speaks" in capsys.readouterr().out
    rejected = map(json.loads, (tmp_path / "out/rejected.jsonl").read_text().splitlines())
    assert {r["id"]: r["reason"] for r in rejected} == {
        "a": "no translation into de",
        "b": "no text",
        "c": "no text",
    }


def test_numbers_for_ids_and_speakers(spoken, tmp_path):
    write(tmp_path / "a.flac", spoken[0])
    lines(tmp_path / "m.jsonl", [json.dumps({"audio": "a.flac", "text": "x", "id": 7, "speaker": 9})])
    (only,) = made(tmp_path / "out", "manifest", "--manifest", tmp_path / "m.jsonl")
    assert (only.id, only.speaker) == ("7", "9")


def test_recordings_of_a_manifest_may_be_elsewhere(tmp_path):
    lines(
        tmp_path / "m.jsonl", ['{"audio": "gs://bucket/a.wav", "text": "x"}', '{"audio": "b", "text": "x"}']
    )
    records = list(Manifest(str(tmp_path / "m.jsonl")).records())
    assert [record.audio for record in records] == ["gs://bucket/a.wav", str(tmp_path / "b")]


def test_other_audio_is_another_data_set(spoken, tmp_path):
    lines(tmp_path / "m.jsonl", [json.dumps({"audio": "a.wav", "text": "x"})])
    fingerprints = set()
    for name, samples in (("one", spoken[0]), ("again", spoken[0]), ("other", spoken[0][::-1])):
        write(tmp_path / "a.wav", samples)
        fingerprints.add(made(tmp_path / name, "manifest", "--manifest", tmp_path / "m.jsonl").fingerprint)
    assert len(fingerprints) == 2


def test_a_data_set_without_all_of_its_shards_is_not_whole(spoken, tmp_path):
    write(tmp_path / "a.wav", spoken[0])
    rows = [json.dumps({"id": str(i), "audio": "a.wav", "text": "x"}) for i in range(64)]
    lines(tmp_path / "m.jsonl", rows)
    made(tmp_path / "out", "manifest", "--manifest", tmp_path / "m.jsonl")
    next((tmp_path / "out").glob("speech-train*00001-of-00002")).unlink()
    with pytest.raises(ValueError, match="is not whole: it has 1 shards"):
        DataSet(tmp_path / "out")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["manifest", "--manifest", "nowhere.jsonl"], "nowhere.jsonl does not exist"),
        (["manifest", "--manifest", "m.docx"], "is no manifest: give .jsonl, .tsv or .csv"),
        (["librispeech", "--manual-dir", "nowhere"], "is no subset of LibriSpeech"),
        (["covost2", "--manual-dir", "nowhere", "--target", "de"], "validated.tsv does not exist"),
        (["must_c", "--manual-dir", "nowhere", "--target", "de"], "train.yaml does not exist"),
    ],
)
def test_a_source_that_is_not_there_is_said_and_leaves_nothing(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        made(tmp_path / "out", *arguments)
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_data_set_that_is_there_is_not_touched(small_world, capsys):
    before = sorted((small_world / "seen").iterdir())
    with pytest.raises(SystemExit):
        made(small_world / "seen", "manifest", "--manifest", "m.jsonl")
    assert "is there already" in capsys.readouterr().err
    assert sorted((small_world / "seen").iterdir()) == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_killed_run_leaves_no_data_set(number, spoken, tmp_path, capsys):
    for i in range(400):
        write(tmp_path / f"a/{i}.wav", np.roll(spoken[0], i))
    rows = [{"audio": f"a/{i}.wav", "text": f"sentence {i}"} for i in range(400)]
    lines(tmp_path / "m.jsonl", map(json.dumps, rows))
    out, manifest = tmp_path / "out", str(tmp_path / "m.jsonl")
    command = [sys.executable, "-m", "sparqle_jax.data.prepare", "manifest", str(out), "--manifest", manifest]
    process = subprocess.Popen([*command, *ONE_PROCESS], stderr=subprocess.DEVNULL, start_new_session=True)
    while process.poll() is None and not list(tmp_path.glob("incomplete.*")):
        time.sleep(0.01)
    os.killpg(process.pid, number)
    assert process.wait() != 0
    assert not out.exists()
    with pytest.raises(FileNotFoundError, match="is no data set"):
        DataSet(out)
    data = made(out, "manifest", "--manifest", manifest)
    left = list(tmp_path.glob("incomplete.*"))
    assert bool(left) == (number == signal.SIGKILL)
    for folder in left:
        assert f"{folder} is what a run has left that was killed" in capsys.readouterr().out
    assert len(data) == 400
    assert len(list(out.glob("speech-train*"))) == builder.num_shards(400) == 12


def test_all_cores_give_what_one_gives(spoken, tmp_path):
    for i, samples in enumerate(spoken):
        write(tmp_path / f"a/{i}.flac", samples)
    rows = [row | {"id": f"{k}-{row['audio']}"} for k in range(20) for row in manifest_rows()]
    lines(tmp_path / "m.jsonl", map(json.dumps, rows))
    one = made(tmp_path / "one", "manifest", "--manifest", tmp_path / "m.jsonl")
    manifest = ["--manifest", str(tmp_path / "m.jsonl")]
    assert prepare.main(["manifest", str(tmp_path / "all"), *manifest]) == 0
    assert DataSet(tmp_path / "all").fingerprint == one.fingerprint
    names = sorted(file.name for file in (tmp_path / "one").iterdir())
    assert sorted(file.name for file in (tmp_path / "all").iterdir()) == names
    everything = DataSet(tmp_path / "all")
    for i in range(80):
        np.testing.assert_array_equal(everything.waveform(i), one.waveform(i))


def test_a_corpus_is_its_data_sets_one_after_the_other(small_world):
    sets = [DataSet(small_world / name) for name in ("train", "seen", "unseen")]
    corpus = Corpus(sets)
    assert len(corpus) == 24 + 8 + 8
    for index, (number, place) in {0: (0, 0), 23: (0, 23), 24: (1, 0), 31: (1, 7), 39: (2, 7)}.items():
        assert corpus.locate(index) == (number, place)
        assert corpus[index] == sets[number][place]
        np.testing.assert_array_equal(corpus.samples(index), sets[number].samples(place))
        assert corpus.num_samples[index] == len(corpus.samples(index))


def test_a_broken_index_or_record_is_named(small_world, tmp_path):
    shutil.copytree(small_world / "seen", tmp_path / "data")
    data = DataSet(tmp_path / "data")
    (shard,) = (tmp_path / "data").glob("speech-train*")
    content = bytearray(shard.read_bytes())
    content[len(content) // 3 : len(content) // 2] = bytes(len(content) // 2 - len(content) // 3)
    shard.write_bytes(content)
    with pytest.raises(ValueError, match=rf"'00000\d-0' can't be read, record \d of .*, in {shard.name}"):
        list(map(data.waveform, range(len(data))))
    (tmp_path / "data/index.arrow").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="is broken"):
        DataSet(tmp_path / "data")
