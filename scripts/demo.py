"""Chat with a trained adapter and its base model side by side, on a local page that shows the routing of each token.

Run as ``python -m scripts.demo --adapter DIR`` from the repository root. Nothing leaves the machine: the page is served
to it alone, without telemetry.
"""

import os
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from data import TEMPLATES, InputError
from inference.generation import DecodingArguments, generate_answers
from inference.pictures import COLOURS
from inference.routing import group_spans, span_text, task_type_names
from inference.token_routing import TokenRouting, route_tokens, token_texts
from inference.trained import InferenceArguments, load_trained
from loading.command_line import flag, one_of, parse_flags, range_problems, refuse, run_verb
from peft import LoraConfig, PeftModel
from scripts.generate import Answerer, GenerateArguments, encode_conversation

if TYPE_CHECKING:
    import gradio

COMMAND = "python -m scripts.demo"
ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ROOT / ".cache" / "demo"
HOST = "127.0.0.1"
BASE, ADAPTED = "generated_by_base", "generated"
MEAN = -1
LEAST_TINT, MOST_TINT = 0.2, 0.5  # text stays readable on it
LINES = ("solid", "dashed", "dotted", "double")
CSS = (
    f":root {{--tint: {MOST_TINT:.0%}}}"
    + """
.html-container {padding: 0 !important}
.conversations {display: grid; gap: 1em; grid-template-columns: repeat(auto-fit, minmax(min(20em, 100%), 1fr))}
.conversation {
  position: relative; min-height: 12em; padding: 1em; overflow-wrap: anywhere; background: var(--block-background-fill);
  border: 1px solid var(--border-color-primary); border-radius: 4px}
.conversation h3 {margin: 0 0 0.5em}
.question, .answer {white-space: pre-wrap; margin: 0.5em 0; line-height: 1.8}
.question {padding: 0 0.6em; border-left: 3px solid var(--border-color-primary); opacity: 0.8}
.token, .key {
  background: color-mix(in srgb, var(--group) var(--tint), transparent); border-bottom: 2px var(--line) var(--group)}
.token:hover, .token:focus {outline: 2px solid var(--group)}
.token:hover::after, .token:focus:not(:hover)::after {
  content: attr(data-weights); position: absolute; left: 1em; right: 1em; width: fit-content; margin-top: 2em;
  z-index: 9; padding: 0.3em 0.6em; white-space: pre-wrap; font-size: 0.85em; line-height: 1.4; pointer-events: none;
  color: var(--body-text-color); background: var(--background-fill-primary);
  border: 1px solid var(--group); border-radius: 4px; box-shadow: 0 2px 8px #0004}
.legend {display: flex; flex-wrap: wrap; gap: 0.3em 1.5em}
.key {padding: 0 0.4em}
"""
    + "".join(
        f".group-{number} {{--group: {COLOURS[number % len(COLOURS)]}; --line: {LINES[number // len(COLOURS)]}}}\n"
        for number in range(len(LINES) * len(COLOURS))
    )
)


@dataclass
class DemoArguments:
    """The page."""

    port: int = flag(7860, "port of the page on this machine")
    template: str | None = flag(None, f"prompt template: {', '.join(TEMPLATES)}; by default the run's")

    def problems(self) -> list[str]:
        ports = ("from 1 to 65535", lambda value: 1 <= value <= 65535, ("port",))
        return range_problems(self, [ports, one_of(TEMPLATES, "template")])


KINDS = (InferenceArguments, DecodingArguments, DemoArguments)


@dataclass(frozen=True)
class Answer:
    """The text of each token of an answer and, for the adapted model's, the routing of the tokens."""

    texts: list[str]
    routing: TokenRouting | None


@dataclass(frozen=True)
class Exchange:
    """A question and the answers to it that are there, by the model's name in `Answerer.voices`."""

    question: str
    answers: dict[str, Answer]


def main(argv: list[str] | None = None) -> None:
    """Read the command line, load the model and serve the page until Ctrl-C.

    Raises:
        InputError: Gradio is not installed, the port is taken, or flags or adapter cannot be used.
    """
    inference, decoding, args = parse_flags(COMMAND, __doc__.splitlines()[0], KINDS, argv)
    prepare_gradio()
    refuse([port_problem(args.port)])
    trained = load_trained(inference)
    if not isinstance(trained.model, PeftModel) or trained.model.active_peft_config.routed_experts == 1:
        raise InputError(
            f"{inference.adapter} does not have a router, so there is nothing to look into; "
            f"chat with it by python -m scripts.generate --adapter {inference.adapter} --chat"
        )
    answerer = Answerer(trained, decoding, GenerateArguments(template=args.template, compare_base=True))
    serve(build_page(answerer, inference.adapter), args.port)


def prepare_gradio() -> None:
    """Make Gradio importable, without telemetry.

    Raises:
        InputError: it is not installed.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    # Gradio asks its own server if it is there.
    proxied = os.environ.get("no_proxy") or os.environ.get("NO_PROXY")
    os.environ["no_proxy"] = f"{proxied},{HOST}" if proxied else HOST
    sys.path.append(str(PACKAGES))  # at the end: what training has stays as it is
    if not find_spec("gradio"):
        raise InputError(
            "the page needs Gradio, which is not installed:\n"
            f"{sys.executable} -m pip install --target {PACKAGES} -r {ROOT / 'requirements-demo.txt'}"
        )


def port_problem(port: int) -> str | None:
    """A message if a port of this machine cannot be listened on, or None."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((HOST, port))
        except OSError as error:
            return f"--port {port}: {error.strerror}; choose another"
    return None


def serve(page: "gradio.Blocks", port: int) -> None:
    """Serve a page until Ctrl-C.

    Raises:
        InputError: the port has been taken since it was checked.
    """
    import gradio

    fonts = {"font": ("system-ui", "sans-serif"), "font_mono": ("ui-monospace", "monospace")}
    try:
        _, url, _ = page.launch(
            server_name=HOST,
            server_port=port,
            share=False,
            prevent_thread_lock=True,
            quiet=True,
            footer_links=[],
            enable_monitoring=False,
            ssr_mode=False,
            theme=gradio.themes.Default(**fonts),
            css=CSS,
        )
    except OSError:
        raise InputError(port_problem(port) or f"--port {port} cannot be used; choose another") from None
    print(f"The page is at {url} (Ctrl-C ends it)", flush=True)
    page.block_thread()


def build_page(answerer: Answerer, name: str) -> "gradio.Blocks":
    """The page: legend, selector of the Linear, both conversations, and the field to type in."""
    import gradio

    config = answerer.trained.model.active_peft_config
    modules = route_tokens(answerer.trained.model, [answerer.tokenizer.pad_token_id]).modules
    layers = [("mean of all", MEAN), *((name.removeprefix("base_model.model."), at) for at, name in enumerate(modules))]
    titles = {BASE: f"Base model: {answerer.trained.base_model}", ADAPTED: f"Adapted: {name}"}

    def show(exchanges: list[Exchange], layer: int) -> str:
        return conversations_html(titles, exchanges, layer, config)

    def send(question: str, exchanges: list[Exchange], layer: int) -> Iterator[list]:
        try:
            for longer in ask(answerer, exchanges, question):
                yield ["", longer, show(longer, layer)]
        except (InputError, torch.OutOfMemoryError) as error:
            gradio.Warning(escape(f"not answered: {error}"))
            yield [question, exchanges, show(exchanges, layer)]

    with gradio.Blocks(title="LoRAMoE: experts by token", analytics_enabled=False, fill_width=True) as page:
        exchanges = gradio.State([])
        layer = gradio.Dropdown(layers, value=MEAN, label="weights of adapted Linear", num_choices_shown=None)
        gradio.HTML(legend_html(config))
        pane = gradio.HTML(show([], MEAN))
        question = gradio.Textbox(label="message to both models", max_lines=8, submit_btn=True, autofocus=True)
        again = gradio.Button("New conversation", size="sm")
        # One at a time: both models are the same one, with the experts on and off.
        answering = question.submit(
            send,
            [question, exchanges, layer],
            [question, exchanges, pane],
            concurrency_limit=1,
            show_progress="hidden",
            api_visibility="private",
        )
        for event in (layer.change, answering.then):  # a Linear may be selected while the models answer
            event(show, [exchanges, layer], pane, show_progress="hidden", api_visibility="private")
        again.click(lambda: ([], show([], MEAN)), None, [exchanges, pane], cancels=answering, api_visibility="private")
    return page


def ask(answerer: Answerer, exchanges: list[Exchange], question: str) -> Iterator[list[Exchange]]:
    """The conversation with one more question, unless it is empty: without an answer, with the base model's, with both.

    Raises:
        InputError: the question is too long or not Unicode.
    """
    if not question.strip():
        yield exchanges
        return
    asked = {"role": "user", "content": question}
    before = exchanges if answerer.template == "chat" else []
    prompts = {name: encode_conversation(answerer, [*_turns(before, name), asked])[1] for name in (BASE, ADAPTED)}
    answers: dict[str, Answer] = {}
    yield [*exchanges, Exchange(question, answers)]
    for name, prompt in prompts.items():
        torch.manual_seed(answerer.seed + len(exchanges))
        with answerer.voices[name]():
            (ids,) = generate_answers(answerer.trained.model, [prompt], answerer.settings)
        routing = route_tokens(answerer.trained.model, prompt + ids, len(prompt)) if name == ADAPTED else None
        answers = {**answers, name: Answer(token_texts(answerer.tokenizer, ids), routing)}
        yield [*exchanges, Exchange(question, answers)]


def conversations_html(titles: dict[str, str], exchanges: list[Exchange], layer: int, config: LoraConfig) -> str:
    """The conversations with several models, side by side where the window is wide enough.

    Args:
        titles: by the model's name.
        layer: index of the Linear whose weights are shown, or MEAN.
    """
    panes = []
    for name, title in titles.items():
        parts = [f"<h3>{escape(title)}</h3>"]
        for each in exchanges:
            answer = answer_html(each.answers[name], layer, config) if name in each.answers else "…"
            parts.append(f'<div class="question">{escape(each.question)}</div><div class="answer">{answer}</div>')
        panes.append(f'<div class="conversation">{"".join(parts)}</div>')
    return f'<div class="conversations">{"".join(panes)}</div>'


def answer_html(answer: Answer, layer: int, config: LoraConfig) -> str:
    """An answer, with its tokens coloured if their routing is known."""
    if answer.routing is None:
        return escape("".join(answer.texts))
    weights_TLE = answer.routing.weights_TLE
    weights_TE = weights_TLE.mean(dim=1) if layer == MEAN else weights_TLE[:, layer]
    groups = shown_groups(config)
    pairs = zip(answer.texts, weights_TE, strict=True)
    return "".join(token_html(text, weights_E, groups, config.null_expert) for text, weights_E in pairs if text)


def token_html(text: str, weights_E: Tensor, groups: list[slice], null_expert: int | None = None) -> str:
    """A token in the colour of the group that weighs most, the stronger the more it weighs; hovering shows the weights.

    Args:
        groups: the experts of each group.
        null_expert: number of the null expert, if there is one.
    """
    shares = [weights_E[span].sum().item() for span in groups]
    lines = [f"{span_text(span, null_expert)}: {share:.1%}" for span, share in zip(groups, shares, strict=True)]
    if len(groups) < len(weights_E):
        names = ["null" if expert == null_expert else str(expert) for expert in range(len(weights_E))]
        each = zip(names, weights_E.tolist(), strict=True)
        lines.append("by expert: " + ", ".join(f"{name}: {weight:.1%}" for name, weight in each))
    lead = (max(shares) - 1 / len(groups)) / (1 - 1 / len(groups))  # 0 is even, 1 is this group alone
    tint = LEAST_TINT + (MOST_TINT - LEAST_TINT) * lead
    return (
        f'<span class="token {_group_class(shares.index(max(shares)))}" style="--tint: {tint:.0%}" tabindex="0" '
        f'data-weights="{escape(chr(10).join(lines))}">{escape(text)}</span>'
    )


def legend_html(config: LoraConfig) -> str:
    """The colour of each expert group, with the name of its task type."""
    spans = shown_groups(config)
    named = len(spans) == config.num_task_types
    names = [f": {name}" for name in task_type_names(config)] if named else [""] * len(spans)
    keys = [
        f'<span class="key {_group_class(number)}">{escape(span_text(span, config.null_expert) + name)}</span>'
        for number, (span, name) in enumerate(zip(spans, names, strict=True))
    ]
    text = "Colour of a token: the experts with most weight, stronger the further they lead; hover for the numbers."
    return f'<div class="legend">{"".join(keys)}<span>{text}</span></div>'


def shown_groups(config: LoraConfig) -> list[slice]:
    """The experts that share a colour: those of a group, or each alone if there are not several groups."""
    several = len(config.group_sizes) > 1
    return group_spans(config.group_sizes if several else [1] * config.routed_experts)


def _group_class(number: int) -> str:
    return f"group-{number % (len(LINES) * len(COLOURS))}"


def _turns(exchanges: list[Exchange], name: str) -> list[dict[str, str]]:
    """The conversation with one model, as its prompt; without questions whose answer was interrupted."""
    answered = [each for each in exchanges if name in each.answers]
    return [
        {"role": role, "content": text}
        for each in answered
        for role, text in (("user", each.question), ("assistant", "".join(each.answers[name].texts)))
    ]


if __name__ == "__main__":
    run_verb(main)
