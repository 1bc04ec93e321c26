"""The web demo in a real browser, headless: `sparqle app` with the miniature, driven as a user does.

Needs Debian's `chromium`, and `playwright` to drive it. The pictures are left in $SCREENSHOTS, if it is set.
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from sparqle_jax.demo.speech import Voice, synthesise

pytest.importorskip("gradio", reason="the web demo needs gradio")
playwright = pytest.importorskip("playwright.sync_api", reason="a browser is driven by playwright")
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium here")

SENTENCE = "the train to vienna leaves at seven thirty five"
GERMAN = "der zug nach wien fährt um sieben uhr fünfunddreißig"
OTHER = "this house was built in nineteen sixty two"
SPOKEN = "my sister has twelve apples"  # into the microphone
LIMITS = ["--max-seconds", "130", "--max-megabytes", "5"]


def write(file: Path, *parts: str | float) -> Path:
    """Sentences, and seconds of silence, as a recording."""
    waves = [
        synthesise(part, Voice("en-us", "m3", 200))
        if isinstance(part, str)
        else np.zeros(round(16_000 * part))
        for part in parts
    ]
    soundfile.write(file, np.concatenate(waves), 16_000, subtype="PCM_16")
    return file


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("recordings")
    write(folder / "train.wav", SENTENCE)
    write(folder / "house.wav", OTHER)
    write(folder / "two.wav", SENTENCE, 1.0, OTHER)
    write(folder / "microphone.wav", 0.5, SPOKEN, 1.5)
    write(folder / "slow.wav", *[SENTENCE, 1.0] * 40)
    write(folder / "long.wav", SENTENCE, 130.0)
    (folder / "notes.wav").write_text("dear diary,\n" * 200)
    (folder / "large.wav").write_bytes(bytes(5 * 2**20 + 1))
    return folder


@pytest.fixture(scope="module")
def address():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "sparqle_jax", "app", "--port", str(port), *LIMITS]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        said = []
        for line in server.stdout:
            said.append(line)
            if found := re.search(r"open (http://\S+)", line):
                break
        else:
            pytest.fail(f"it did not start: {said}")
        assert re.search(r"compiled for short recordings in [\d.]+ s", said[0])
        yield found[1]
    finally:
        server.send_signal(signal.SIGTERM)
        assert server.wait(30) == 0


@pytest.fixture(scope="module")
def browser(folder):
    with playwright.sync_playwright() as driver:
        yield driver.chromium.launch(
            executable_path=CHROMIUM,
            args=[
                "--no-sandbox",  # tests may run as root
                "--use-fake-device-for-media-stream",
                "--use-fake-ui-for-media-stream",
                f"--use-file-for-fake-audio-capture={folder / 'microphone.wav'}",
            ],
        )


@pytest.fixture
def open_page(browser, address):
    """Opens pages; at the end they must have asked no other host for anything."""
    contexts, asked = [], []

    def open_page(**options):
        contexts.append(context := browser.new_context(**options))
        page = context.new_page()
        page.set_default_timeout(60_000)
        page.on("request", lambda request: asked.append(request.url))
        page.goto(address)
        page.locator("#run").wait_for()
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert asked
    assert [url for url in asked if not url.startswith((address, "data:", "blob:"))] == []


def upload(page, file: Path) -> None:
    page.get_by_label("Upload file").click()
    page.locator("#recording input[type=file]").set_input_files(file)


def refused(page) -> str:
    return page.locator("#message .refused").inner_text()


def run(page) -> str:
    page.locator("#run").click()
    page.locator("#message").get_by_text("answered in").wait_for()
    return page.get_by_label("Answer", exact=True).input_value()


def loaded(page) -> None:
    """The recording has come."""
    page.locator("#recording").get_by_label("Play", exact=True).wait_for()
    page.locator("#run:enabled").wait_for()


def picture(page, name: str, tmp_path: Path) -> None:
    folder = Path(os.environ.get("SCREENSHOTS", tmp_path))
    page.screenshot(path=folder / f"{name}.png", full_page=True)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("light", dict(viewport=dict(width=1280, height=860))),
        ("dark", dict(viewport=dict(width=1280, height=860), color_scheme="dark")),
        ("phone", dict(viewport=dict(width=390, height=844), device_scale_factor=2, is_mobile=True)),
    ],
)
def test_an_upload_is_heard_and_drawn(open_page, folder, tmp_path, name, options):
    page = open_page(**options)
    upload(page, folder / "train.wav")
    loaded(page)
    assert run(page) == SENTENCE
    assert page.locator("#picture .heat i").count() == 1
    assert page.locator("#segments table").count() == 0
    wave, heat = (page.locator(f"#picture {what}").bounding_box() for what in ("svg", ".heat i"))
    assert wave["width"] > 200
    assert wave["x"] == pytest.approx(heat["x"], abs=1)
    assert wave["width"] == pytest.approx(heat["width"], abs=1)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    picture(page, name, tmp_path)


def test_it_translates(open_page, folder):
    page = open_page()
    upload(page, folder / "train.wav")
    loaded(page)
    page.get_by_label("Translate").check()
    page.get_by_label("Into").wait_for()
    assert run(page) == GERMAN


def test_a_language_that_is_none_is_refused(open_page, folder):
    page = open_page()
    upload(page, folder / "train.wav")
    loaded(page)
    page.get_by_label("Translate").check()
    page.get_by_label("Into").fill("klingonish")
    page.keyboard.press("Tab")
    page.locator("#run").click()
    assert "'klingonish' is not known as a language" in refused(page)


def test_it_answers_a_question_with_other_settings(open_page, folder, tmp_path):
    page = open_page()
    page.get_by_text(SENTENCE).click()  # an example
    loaded(page)
    page.get_by_label("Ask").check()
    page.get_by_role("button", name="Decoding settings").click()
    page.get_by_label("number input for Beams").fill("2")
    page.locator("#run").click()
    assert "There is no question yet" in refused(page)
    page.get_by_label("Question").fill("Translate to Spanish.")
    picture(page, "settings", tmp_path)
    assert run(page)


def test_a_recording_from_the_microphone_is_heard(open_page, tmp_path):
    page = open_page()
    recorder = page.locator("#recording")
    recorder.get_by_role("button", name="Record", exact=True).click()
    page.wait_for_timeout(9000)  # the microphone says it again and again: at least once as a whole
    recorder.get_by_role("button", name="Stop", exact=True).click()
    loaded(page)
    assert SPOKEN in run(page)
    picture(page, "microphone", tmp_path)


def test_a_long_recording_is_answered_piece_by_piece(open_page, folder, tmp_path):
    page = open_page()
    upload(page, folder / "two.wav")
    loaded(page)
    assert run(page) == f"{SENTENCE} {OTHER}"
    assert page.locator("#segments td").all_inner_texts() == [SENTENCE, OTHER]
    assert page.locator("#picture .heat i").count() == 2
    picture(page, "segments", tmp_path)


def test_what_is_no_recording_is_refused(open_page, folder, tmp_path):
    page = open_page()
    assert page.locator("#run").is_disabled()
    upload(page, folder / "notes.wav")
    page.locator("#message .refused").get_by_text("notes.wav can't be read as a recording").wait_for()
    assert str(folder) not in (message := refused(page))
    assert "/" not in message
    picture(page, "refused", tmp_path)


def test_a_recording_that_is_too_long_is_refused(open_page, folder):
    page = open_page()
    upload(page, folder / "long.wav")
    page.locator("#message .refused").get_by_text("but can have at most 130 s").wait_for()


def test_a_recording_that_is_too_large_is_refused(open_page, folder):
    page = open_page()
    upload(page, folder / "large.wav")
    page.get_by_text(re.compile("exceeds? the maximum|size exceeded|too large", re.I)).first.wait_for()


def test_two_users_at_once_get_their_own_answers(open_page, folder):
    files = {"train.wav": SENTENCE, "house.wav": OTHER}
    pages = {name: open_page() for name in files}
    for name, page in pages.items():
        upload(page, folder / name)
        loaded(page)
    for page in pages.values():
        page.locator("#run").click(no_wait_after=True)
    for name, page in pages.items():
        page.locator("#message").get_by_text("answered in").wait_for()
        assert page.get_by_label("Answer", exact=True).input_value() == files[name]


def test_who_waits_sees_the_queue_and_who_works_can_stop(open_page, folder):
    slow, other = open_page(), open_page()
    for page, name in ((slow, "slow.wav"), (other, "house.wav")):
        upload(page, folder / name)
        loaded(page)
    slow.locator("#run").click()
    slow.locator("#message").get_by_text("Listening").wait_for()
    other.locator("#run").click()
    other.locator("#answer").get_by_text("queue: 1/1").wait_for()
    slow.locator("#stop").click()
    slow.locator("#message").get_by_text("Stopped.").wait_for()
    other.locator("#message").get_by_text("answered in").wait_for()
    assert other.get_by_label("Answer", exact=True).input_value() == OTHER


def test_the_keyboard_alone_and_clear(open_page, folder):
    page = open_page()
    upload(page, folder / "train.wav")
    loaded(page)
    page.get_by_role("radio", name="Transcribe").focus()
    for _ in range(6):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "run":
            break
    page.keyboard.press("Enter")
    page.locator("#message").get_by_text("answered in").wait_for()
    for _ in range(6):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.ariaLabel") == "Answer":
            break
    else:
        pytest.fail("the answer can't be reached")
    page.locator("#clear").click()
    page.locator("#picture figure").wait_for(state="detached")
    assert page.get_by_label("Answer", exact=True).input_value() == ""
