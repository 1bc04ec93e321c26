"""A page in the browser: speak or upload, and read what was said, its translation, or an answer.

    sparqle app                                  # the miniature
    sparqle app runs/mine/stage2 --port 8000

Only this machine can reach it, unless --host says otherwise; then whoever reaches it can use it. Browsers
give their microphone to pages of localhost and of https alone: for others put a proxy with https before it.
"""

import argparse
import base64
import contextlib
import html
import io
import logging
import os
import secrets
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from sparqle_jax import audio, commands
from sparqle_jax.sparqle import LENGTHS, MINIATURE, SparQLe, Transcript, with_speech
from sparqle_jax.tasks import TRANSCRIBE, instructions

# Before gradio is loaded: nothing is sent to anyone.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
try:
    import gradio as gr
except ModuleNotFoundError as error:
    if error.name != "gradio":
        raise
    gr = None

log = logging.getLogger(__name__)

TASKS = ["Transcribe", "Translate", "Ask"]
LANGUAGES = (
    *("Arabic", "Chinese", "Czech", "Dutch", "English", "French", "German", "Hindi", "Italian", "Japanese"),
    *("Korean", "Polish", "Portuguese", "Romanian", "Russian", "Spanish", "Turkish", "Ukrainian"),
)
MINIATURE_LANGUAGES = ("German", "French", "Spanish")
SENTENCES = (
    "the train to vienna leaves at seven thirty five",
    "my sister has twelve apples",
    "this house was built in nineteen sixty two",
)
ABOUT = "Speak, and a language model that has learned to listen writes it down, translates it or answers."
ABOUT_MINIATURE = (
    "This is the miniature: a few hundred English words, as synthetic voices say them, also in German, "
    "French and Spanish. Begin with an example."
)
MAX_PROMPT = 500  # characters
MAX_WAITING = 20  # users; others are asked to come back
MAX_PICTURED = 60  # seconds for which attention is drawn: for that, all is encoded a second time
BARS, COLUMNS = 180, 900  # of the waveform, and of the picture of attention
KEPT = 3600  # seconds for which recordings stay here

ACCENT = ("#eef8fa", "#d5eef2", "#aedde5", "#7cc9d6", "#58c4d8", "#178296", "#0b6b7c", "#0a5766", "#0b4652")
ACCENT += ("#0c3a44", "#08262d")
FONTS = ("ui-sans-serif", "system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "sans-serif")
CSS = """
.gradio-container { --wave: #8796a3; --wash: #eef3f4; --heat: #0b6b7c; --soft: #56626e; --bad: #a33409; }
.dark .gradio-container, .gradio-container.dark {
  --wave: #71808d; --wash: #1d2a31; --heat: #6ed6ea; --soft: #a1adb9; --bad: #ff9f7c;
}
.gradio-container { max-width: 76rem !important; margin: 0 auto; }
#about h1 {
  margin: .5rem 0 .25rem; font-size: clamp(1.9rem, 5vw, 2.6rem); line-height: 1.1; letter-spacing: -.03em;
}
#about p { margin: 0 0 .35rem; color: var(--soft); font-size: 1.0625rem; line-height: 1.5; }
#about p + p { font-size: .9375rem; }
#message p { min-height: 1.5em; margin: 0; color: var(--soft); overflow-wrap: anywhere; }
#message .refused {
  padding: .6rem .85rem; border-left: 3px solid var(--bad); border-radius: 6px;
  background: var(--wash); color: var(--bad); font-weight: 500;
}
#answer textarea { font-size: 1.1875rem; line-height: 1.5; }
#privacy p { margin: 1rem 0; color: var(--soft); font-size: .8125rem; text-align: center; }
#segments table { width: 100%; margin: 0; border-collapse: collapse; }
#segments :is(table, tbody, tr) { border: 0; }
#segments caption { padding-bottom: .4rem; font-weight: 600; text-align: left; }
#segments :is(th, td) {
  padding: .45rem .75rem .45rem 0; border: 0 !important;
  border-top: 1px solid var(--border-color-primary) !important;
  text-align: left; vertical-align: baseline;
}
#segments th {
  width: 1%; color: var(--soft); font-size: .875rem; font-weight: 400;
  font-variant-numeric: tabular-nums; white-space: nowrap;
}
.attention { display: grid; grid-template-columns: 1.5rem minmax(0, 1fr); margin: 0; font-size: .75rem; }
.attention svg { display: block; width: 100%; height: 4.5rem; margin-bottom: .5rem; }
.attention path { fill: var(--wave); }
.attention :is(.rows, .heat) { height: 12rem; }
.attention .rows {
  display: flex; flex-direction: column; justify-content: space-between;
  margin-top: 5rem; line-height: 1; color: var(--soft);
}
.attention .rows:empty { height: 0; }
.attention .rows :nth-child(2) { writing-mode: vertical-rl; transform: rotate(180deg); width: 1em; }
.attention .heat { position: relative; overflow: hidden; border-radius: 6px; background: var(--wash); }
.attention .heat i {
  position: absolute; inset-block: 0; background: var(--heat);
  mask-size: 100% 100%; mask-mode: alpha; image-rendering: pixelated;
}
.attention .axis { position: relative; height: 1.75rem; font-variant-numeric: tabular-nums; }
.attention .axis span {
  position: absolute; top: .4rem; transform: translateX(-50%); color: var(--soft); white-space: nowrap;
}
.attention .axis span:first-child { transform: none; }
.attention figcaption { grid-column: 2; color: var(--soft); font-size: .8125rem; line-height: 1.5; }
"""
# The label of a box with a button in it is the button's.
JS = """() => { document.querySelector("#answer textarea").ariaLabel = "Answer"; }"""


class Refused(ValueError):
    """One line, for the user, on why there is no answer."""


# --- What users give -------------------------------------------------------------------------------------


@contextlib.contextmanager
def _refusing(file: str) -> Iterator[None]:
    try:
        yield
    except audio.UnusableAudio as error:
        # Users know the name of their file alone, and are to know no more of where it lies.
        name = Path(file).name
        reason = " ".join(str(error).replace(file, name).split())
        raise Refused(reason if name in reason else f"{name}: {reason}") from error
    except FileNotFoundError as error:
        raise Refused("The recording is not kept any more: record or upload it once more.") from error


def check_file(file: str, max_seconds: float) -> None:
    """Raises Refused for what is no recording, or too long by its header."""
    with _refusing(file):
        audio.check_length(audio.count_samples(file), round(max_seconds * audio.SAMPLE_RATE))


def read(file: str | None, max_seconds: float) -> np.ndarray:
    """A recording, float32 [S] at 16 kHz. Raises Refused for none, an unusable or a too long one."""
    if not file:
        raise Refused("There is no recording yet: record or upload one first.")
    blocks: list[np.ndarray] = [np.zeros(0, np.float32)]
    with _refusing(file):
        for block in audio.read_blocks(file):
            blocks.append(block)
            # At each block: headers may promise less than there is.
            audio.check_length(sum(map(len, blocks)), round(max_seconds * audio.SAMPLE_RATE))
    return np.concatenate(blocks)


def instruction_of(task: str, language: str | None, prompt: str | None) -> str:
    """The instruction. Raises Refused for no language, and for no prompt or one that is too long."""
    if task == "Transcribe":
        return instructions(TRANSCRIBE)[0]
    if task == "Translate":
        try:
            return instructions((language or "").strip())[0]
        except ValueError as error:
            raise Refused(
                f"{language!r} is not known as a language: choose one, or type German or de."
            ) from error
    prompt = (prompt or "").strip()
    if not prompt:
        raise Refused("There is no question yet: type one first.")
    if len(prompt) > MAX_PROMPT:
        raise Refused(f"The question has {len(prompt)} characters; it can have at most {MAX_PROMPT}.")
    return with_speech(prompt)


def settings_of(
    beams: float, temperature: float, top_p: float, repetition_penalty: float, ngram: float, max_tokens: float
) -> dict[str, Any]:
    """Settings of `GenerationConfig`. Raises Refused for what does not go together."""
    settings: dict[str, Any] = dict(
        do_sample=round(temperature, 1) > 0,
        num_beams=int(beams),
        # Rounded, since a program is compiled for each value.
        repetition_penalty=round(repetition_penalty, 1),
        no_repeat_ngram_size=int(ngram),
        max_new_tokens=int(max_tokens),
    )
    if settings["do_sample"]:
        if settings["num_beams"] > 1:
            raise Refused("Sampling has one beam: set the beams to 1, or the temperature to 0.")
        seed = secrets.randbits(32)
        settings |= dict(temperature=round(temperature, 1), top_p=round(top_p, 2), seed=seed)
    return settings


def check(sparqle: SparQLe, instruction: str, settings: dict[str, Any]) -> None:
    """Raises Refused for what this model can't be asked: prompt and answer may be more than it can hold."""
    try:
        config = sparqle.generation_config(**settings)
        around = sparqle.prompter.prompt(instruction)
    except ValueError as error:
        raise Refused(str(error)) from error
    places = sum(-(-len(tokens) // 16) * 16 for tokens in around)
    places += sparqle.max_speech_tokens + config.max_new_tokens
    if places > sparqle.model.llm.config.max_tokens:
        raise Refused("The question is too long for this model: shorten it, or allow fewer tokens of answer.")


# --- What they get ---------------------------------------------------------------------------------------


def respond(
    sparqle: SparQLe,
    max_seconds: float,
    file: str | None,
    task: str,
    language: str,
    prompt: str,
    *sliders: float,
) -> Iterator[tuple[str, str, str, str]]:
    """Message, answer, timed segments and picture, as they come; the last, the second as text, are HTML."""
    begin = time.perf_counter()
    try:
        instruction, settings = instruction_of(task, language, prompt), settings_of(*sliders)
        check(sparqle, instruction, settings)
        waveform = read(file, max_seconds)
        recording = (waveform, audio.SAMPLE_RATE)
        with _refusing(file):
            windows = list(sparqle.windows(recording))
        seconds = len(waveform) / audio.SAMPLE_RATE
        drawn = picture(waveform, None)
        yield _message("Listening …"), "", "", drawn
        transcript = Transcript(())
        for transcript in sparqle.stream(recording, instruction, **settings):
            yield _message("Listening …"), transcript.text, table(transcript), drawn
        took = time.perf_counter() - begin
        attention = None
        if seconds <= MAX_PICTURED and sparqle.has_attention:
            attention = [(w, sparqle.attention((w.waveform, audio.SAMPLE_RATE))) for w in windows]
        done = f"{seconds:.1f} s of sound, answered in {took:.2f} s."
        if not transcript.complete:
            done += f" An answer was cut at {settings['max_new_tokens']} tokens: allow more of them."
        yield _message(done), transcript.text, table(transcript), picture(waveform, attention, done=True)
    except Refused as error:
        yield refusal(str(error)), "", "", ""
    except Exception:
        log.exception("a request failed")
        yield refusal("Something went wrong here; what, is in the server's log. Try once more."), "", "", ""


def _message(text: str) -> str:
    return f"<p>{html.escape(text)}</p>"


def refusal(text: str) -> str:
    return f'<p class="refused" role="alert">{html.escape(text)}</p>'


def table(transcript: Transcript) -> str:
    """The times and texts of an answer of several segments."""
    if len(transcript.segments) < 2:
        return ""
    rows = "".join(
        f'<tr><th scope="row">{_clock(segment.start)} to {_clock(segment.end)}</th>'
        f"<td>{html.escape(segment.text)}</td></tr>"
        for segment in transcript.segments
        if segment.text
    )
    return f"<table><caption>Segment by segment</caption>{rows}</table>"


def _clock(seconds: float) -> str:
    tenths = round(10 * seconds)
    return f"{tenths // 600}:{tenths // 10 % 60:02}.{tenths % 10}"


def picture(
    waveform: np.ndarray, attention: Sequence[tuple[audio.Window, np.ndarray]] | None, *, done: bool = False
) -> str:
    """The waveform [S], and on the same axis for each window what its queries attend to, [Q, T]."""
    seconds = len(waveform) / audio.SAMPLE_RATE
    loud = np.abs(waveform[: len(waveform) // BARS * BARS]).reshape(BARS, -1).max(1)
    tall = np.maximum(loud / max(float(np.abs(waveform).max()), 1e-9), 0.02)
    path = "".join(f"M{i} {1 - x:.3f}h.62v{2 * x:.3f}h-.62z" for i, x in enumerate(tall))
    wave = (
        f'<svg viewBox="0 0 {BARS} 2" preserveAspectRatio="none" role="img" '
        f'aria-label="Waveform, {seconds:.1f} seconds"><path d="{path}"/></svg>'
    )
    step = next(s for s in (0.5, 1, 2, 5, 10, 30, 60, 120, 300, 600, 3600) if seconds / s <= 7 or s == 3600)
    axis = "".join(
        f'<span style="left: {100 * at / seconds:.2f}%">{at:g} s</span>'
        for at in np.arange(0, seconds * 0.97, step)
    )
    rows, heat, caption = "", "", ""
    if attention:
        queries = len(attention[0][1])
        strongest = max(float(weights.max()) for _, weights in attention)
        parts = "".join(_mask(window, weights / strongest, seconds) for window, weights in attention)
        rows = f"<span>1</span><span>query</span><span>{queries}</span>"
        heat = (
            f'<div class="heat" role="img" aria-label="Which moments each of the {queries} queries attends '
            f'to">{parts}</div>'
        )
        caption = (
            f"Below the waveform, on its axis: each row is one of the {queries} query tokens that the "
            "language model reads, and the stronger the colour, the more it attends to that moment."
        )
    elif not done:
        heat = '<div class="heat"></div>'
    else:
        caption = f"What the queries attend to is drawn for recordings of up to {MAX_PICTURED} s."
    return (
        f'<figure class="attention"><div class="rows" aria-hidden="true">{rows}</div><div>{wave}{heat}'
        f'<div class="axis" aria-hidden="true">{axis}</div></div><figcaption>{caption}</figcaption></figure>'
    )


def _mask(window: audio.Window, weights: np.ndarray, seconds: float) -> str:
    """Weights [Q, T] from 0 to 1 as the opacity of a colour, which is the theme's: one hue, and so even."""
    from PIL import Image  # which comes with gradio

    start, end = window.seconds
    columns = max(1, min(weights.shape[1], round(COLUMNS * (end - start) / seconds)))
    edges = np.arange(columns) * weights.shape[1] // columns
    strength = np.maximum.reduceat(weights, edges, axis=1) ** 0.7
    pixels = np.stack([np.zeros_like(strength), 255 * strength], -1).astype(np.uint8)
    png = io.BytesIO()
    Image.fromarray(pixels).save(png, "PNG")
    data = base64.b64encode(png.getvalue()).decode()
    left, width = 100 * start / seconds, 100 * (end - start) / seconds
    return (
        f'<i style="left: {left:.3f}%; width: {width:.3f}%; '
        f'mask-image: url(data:image/png;base64,{data})"></i>'
    )


# --- The page --------------------------------------------------------------------------------------------


def make_app(
    sparqle: SparQLe,
    *,
    max_seconds: float = 600,
    max_megabytes: float = 50,
    about: str = "",
    languages: Sequence[str] = LANGUAGES,
    examples: Sequence[tuple[str, str]] = (),
) -> "gr.Blocks":
    """The page, with its queue. examples: files, and what is said in them."""

    class Recording(gr.Audio):
        is_template = True  # drawn by its parent's code

        async def async_move_resource_to_block_cache(self, file: str | Path | None) -> str | None:
            # A request that is written by hand can name an address, and gradio would fetch it.
            if str(file).lower().startswith(("http:", "https:")):
                raise gr.Error("Recordings are uploaded, not fetched.", print_exception=False)
            return await super().async_move_resource_to_block_cache(file)

    def look(file: str) -> tuple[str | None, str]:
        try:
            check_file(file, max_seconds)
        except Refused as error:
            return None, refusal(str(error))
        return file, ""

    def show(task: str) -> tuple[Any, Any]:
        return gr.update(visible=task == "Translate"), gr.update(visible=task == "Ask")

    quietly: dict[str, Any] = dict(api_visibility="private", show_progress="hidden")
    own = sparqle.generation_config()
    with gr.Blocks(title="SparQLe", analytics_enabled=False, delete_cache=(KEPT // 6, KEPT)) as app:
        more = f"<p>{html.escape(about)}</p>" if about else ""
        gr.HTML(f"<h1>SparQLe</h1><p>{ABOUT}</p>{more}", elem_id="about")
        with gr.Row():
            with gr.Column(min_width=320):
                recording = Recording(
                    sources=["microphone", "upload"],
                    type="filepath",
                    label=f"Recording, up to {_length(max_seconds)} and {max_megabytes:g} MB",
                    buttons=[],
                    elem_id="recording",
                )
                if examples:
                    gr.Examples(
                        [[file] for file, _ in examples],
                        recording,
                        example_labels=[text for _, text in examples],
                        label="Examples",
                        api_visibility="private",
                    )
                task = gr.Radio(TASKS, value="Transcribe", label="Task")
                language = gr.Dropdown(
                    list(languages),
                    allow_custom_value=True,
                    label="Into",
                    info="Choose, or type a language or its code",
                    visible=False,
                )
                prompt = gr.Textbox(
                    label="Question",
                    info="<SpeechHere> stands for the recording; without it the recording comes first",
                    placeholder="What is this about?",
                    max_length=MAX_PROMPT,
                    lines=2,
                    visible=False,
                )
                with gr.Accordion("Decoding settings", open=False):
                    gr.Markdown("What is set anew is compiled when it is first used, which takes a while.")
                    sliders = [
                        gr.Slider(
                            1,
                            max(8, own.num_beams),
                            own.num_beams,
                            step=1,
                            label="Beams",
                            info="1 is greedy search",
                        ),
                        gr.Slider(
                            0,
                            2,
                            own.temperature if own.do_sample else 0,
                            step=0.1,
                            label="Temperature",
                            info="Of sampling; 0 is none",
                        ),
                        gr.Slider(0.05, 1, own.top_p, step=0.05, label="Top-p", info="Of sampling"),
                        gr.Slider(1, 2, own.repetition_penalty, step=0.1, label="Repetition penalty"),
                        gr.Slider(
                            0,
                            10,
                            own.no_repeat_ngram_size,
                            step=1,
                            label="No repeated n-grams of",
                            info="0 is off",
                        ),
                        gr.Slider(
                            1,
                            own.max_new_tokens,
                            own.max_new_tokens,
                            step=1,
                            label="Tokens of an answer, at most",
                        ),
                    ]
                with gr.Row():
                    run = gr.Button("Run", min_width=80, variant="primary", interactive=False, elem_id="run")
                    stop = gr.Button("Stop", min_width=80, variant="secondary", elem_id="stop")
                    clear = gr.Button("Clear", min_width=80, variant="secondary", elem_id="clear")
                message = gr.HTML(html_template='<div role="status">${value}</div>', elem_id="message")
            with gr.Column(min_width=320):
                text = gr.Textbox(
                    label="Answer",
                    placeholder="The text comes here as it is written",
                    lines=3,
                    buttons=["copy"],
                    interactive=True,  # else the keyboard can't reach it
                    elem_id="answer",
                )
                drawn = gr.HTML(elem_id="picture")
                segments = gr.HTML(elem_id="segments", max_height=420)
        gr.HTML(
            "<p>What you record is sent to the machine that serves this page and nowhere else; there it is "
            f"deleted within {_length(2 * KEPT)}.</p>",
            elem_id="privacy",
        )
        outputs = [message, text, segments, drawn]
        running = run.click(
            partial(respond, sparqle, max_seconds),
            [recording, task, language, prompt, *sliders],
            outputs,
            show_progress="full",
            show_progress_on=text,
            api_visibility="private",
        )
        task.change(show, task, [language, prompt], queue=False, **quietly)
        # While a recording is on its way, there is nothing to run.
        recording.change(
            lambda file: gr.update(interactive=file is not None), recording, run, queue=False, **quietly
        )
        recording.upload(look, recording, [recording, message], **quietly)
        # First the one, then the other: else what is on its way from the model comes after it.
        stop.click(None, cancels=[running], **quietly).then(
            lambda: _message("Stopped."), None, message, queue=False, **quietly
        )
        clear.click(None, cancels=[running], **quietly).then(
            lambda: (None, "", "", "", ""), None, [recording, *outputs], queue=False, **quietly
        )
    return app.queue(max_size=MAX_WAITING, api_open=False, default_concurrency_limit=1)


def _length(seconds: float) -> str:
    whole, unit = (seconds / 3600, "hour") if seconds >= 3600 else (seconds / 60, "minute")
    if seconds < 60 or whole != int(whole):
        whole, unit = seconds, "second"
    return f"{whole:g} {unit}{'' if whole == 1 else 's'}"


def launch(app: "gr.Blocks", host: str, port: int, max_megabytes: float) -> str:
    """Serves the page from threads of its own: its address. Raises OSError for a port that is not free."""
    accent = gr.themes.Color(*ACCENT)
    _, url, _ = app.launch(
        server_name=host,
        server_port=port,
        max_file_size=round(max_megabytes * 2**20),
        theme=gr.themes.Default(primary_hue=accent, secondary_hue=accent, neutral_hue="slate", font=FONTS),
        css=CSS,
        js=JS,
        share=False,
        inbrowser=False,
        prevent_thread_lock=True,
        quiet=True,
        show_error=False,
        run_history=False,
        app_kwargs=dict(openapi_url=None),
        enable_monitoring=False,
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
        footer_links=[],
    )
    return url


def warm_up(sparqle: SparQLe) -> float:
    """Compiles what short recordings need: seconds it took."""
    begin = time.perf_counter()
    samples = round(sparqle.config.max_seconds * audio.SAMPLE_RATE) // LENGTHS
    noise = np.random.default_rng(0).normal(0, 0.1, samples).astype(np.float32)
    for _ in sparqle.stream((noise, audio.SAMPLE_RATE), instructions(TRANSCRIBE)[0]):
        pass
    if sparqle.has_attention:
        sparqle.attention((noise, audio.SAMPLE_RATE))
    return time.perf_counter() - begin


def make_examples(folder: Path) -> list[tuple[str, str]]:
    """The sentences as files in a folder; none where espeak-ng is not installed."""
    try:
        from sparqle_jax.demo.speech import Voice, synthesise
    except ModuleNotFoundError:
        return []
    examples = []
    for number, sentence in enumerate(SENTENCES, 1):
        file = folder / f"example-{number}.wav"
        soundfile.write(
            file, synthesise(sentence, Voice("en-us", "m3", 200)), audio.SAMPLE_RATE, subtype="PCM_16"
        )
        examples.append((str(file), sentence))
    return examples


def make_parser() -> argparse.ArgumentParser:
    parser = commands.make_parser("app", __doc__)
    parser.add_argument(
        "model", nargs="?", type=Path, default=MINIATURE, help="a model folder; else the miniature"
    )
    commands.add_tower_arguments(parser)
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to serve at (127.0.0.1: this machine alone)"
    )
    parser.add_argument("--port", type=int, default=7860, help="(7860)")
    parser.add_argument("--max-seconds", type=float, default=600, metavar="X", help="of a recording (600)")
    parser.add_argument("--max-megabytes", type=float, default=50, metavar="X", help="of a recording (50)")
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = make_parser()
    args = parser.parse_args(argv)
    if gr is None:
        print(
            "sparqle app needs gradio: pip install 'sparqle_jax[app]', or in a checkout "
            "pip install -e '.[app]'.",
            file=sys.stderr,
        )
        return 2
    for name in ("max_seconds", "max_megabytes"):
        if not 0 < getattr(args, name) < float("inf"):
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: more than 0.")
    try:
        sparqle = SparQLe.from_pretrained(args.model, encoder=args.encoder, llm=args.llm)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(f"compiled for short recordings in {warm_up(sparqle):.1f} s", flush=True)
    # So that recordings are deleted when the command ends, whichever way.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="sparqle-app-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        miniature = args.model.resolve() == MINIATURE.resolve()
        app = make_app(
            sparqle,
            max_seconds=args.max_seconds,
            max_megabytes=args.max_megabytes,
            about=ABOUT_MINIATURE if miniature else f"The model is {args.model.resolve().name}.",
            languages=MINIATURE_LANGUAGES if miniature else LANGUAGES,
            examples=make_examples(Path(folder)) if miniature else (),
        )
        try:
            url = launch(app, args.host, args.port, args.max_megabytes)
        except OSError:
            parser.error(
                f"can't serve at {args.host}:{args.port}: choose a --port that is free, and a --host here."
            )
        print(f"open {url} (Ctrl-C ends it)", flush=True)
        app.block_thread()
    return 0


if __name__ == "__main__":
    sys.exit(main())
