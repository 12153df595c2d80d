"""The page with the routing of each token: its weights, its HTML, what it refuses, and the page itself in a browser."""

import os
import shutil
import signal
import socket
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, filled_model, tiny_tokenizer
from test_launch import environment, free_port

from data import InputError
from inference.token_routing import TokenRouting, route_tokens, token_texts
from peft import LoraConfig
from scripts import demo, generate
from transformers_patch import RoutingRecorder

PLAYWRIGHT = "playwright==1.65.2"
LOOKS = ((1280, 800, "light"), (420, 800, "dark"))


@pytest.fixture
def start(adapter_dir, monkeypatch):
    """Calls the program as if Gradio were installed; the page is not served."""
    served = []
    monkeypatch.setattr(demo, "prepare_gradio", lambda: None)
    monkeypatch.setattr(demo, "build_page", lambda *args: args)
    monkeypatch.setattr(demo, "serve", lambda *args: served.append(args))

    def call(*flags, adapter=adapter_dir):
        demo.main(["--adapter", str(adapter), *map(str, flags)])
        return served[-1]

    return call


@pytest.fixture
def answerer(start):
    (answerer, _), _ = start("--port", free_port(), "--template", "chat", "--max_new_tokens", 6)
    return answerer


def test_the_weights_of_a_text_are_those_of_its_forward():
    model, ids = filled_model().eval(), [5, 9, 200, 17, 40]
    with torch.no_grad(), RoutingRecorder(model) as recorder:
        model(torch.tensor([ids]))
    routing = route_tokens(model, ids, first=2)
    assert routing.weights_TLE.shape == (3, 6, 4)
    assert routing.modules[1] == "base_model.model.model.layers.0.mlp.up_proj"
    for at, weights_1TE in enumerate(recorder.weights.values()):
        assert torch.equal(routing.weights_TLE[:, at], weights_1TE[0, 2:])
    assert routing.weights_TLE.std(dim=0).min() > 0
    assert routing.weights_TLE.std(dim=1).min() > 0


def test_the_texts_of_tokens_are_those_of_the_whole_answer():
    tokenizer = tiny_tokenizer()
    ids = [*tokenizer("the cat é 🌈!", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    texts = token_texts(tokenizer, ids)
    assert "".join(texts) == "the cat é 🌈!"
    assert len(texts) == len(ids)
    assert texts[-6:] == ["", "", "", "🌈", "!", ""]
    cut = token_texts(tokenizer, ids[:-3])
    assert "".join(cut) == tokenizer.decode(ids[:-3])
    assert cut[-1] == "\ufffd"


def test_a_token_has_the_class_of_the_group_that_weighs_most():
    weights_E, groups = torch.tensor([0.1, 0.2, 0.4, 0.3]), [slice(0, 2), slice(2, 4)]
    html = demo.token_html("cat", weights_E, groups)
    assert 'class="token group-1" style="--tint: 32%"' in html
    assert 'data-weights="experts 0-1: 30.0%\nexperts 2-3: 70.0%\n' in html
    assert "by expert: 0: 10.0%, 1: 20.0%, 2: 40.0%, 3: 30.0%" in html
    with_null = demo.token_html("cat", weights_E, [slice(0, 3), slice(3, 4)], null_expert=3)
    assert 'data-weights="experts 0-2: 70.0%\nnull expert: 30.0%\n' in with_null
    assert "by expert: 0: 10.0%, 1: 20.0%, 2: 40.0%, null: 30.0%" in with_null
    assert 'class="token group-2"' in demo.token_html("cat", weights_E, [slice(0, 1), slice(1, 2), slice(2, 4)])


def test_the_selected_linear_gives_the_weights():
    weights_TLE = torch.tensor([[[0.9, 0.1], [0.2, 0.8]]])
    answer, config = demo.Answer(["cat"], TokenRouting(["a", "b"], weights_TLE)), LoraConfig(lora_nums=2)
    shown = [demo.answer_html(answer, layer, config) for layer in (0, 1, demo.MEAN)]
    assert [f"expert 0: {share}%" in html for share, html in zip(("90.0", "20.0", "55.0"), shown, strict=True)]
    assert ["group-1" in html for html in shown] == [False, True, False]


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({}, ["experts 0-2: task type 0 (other tasks)", "experts 3-5: task type 1 (world knowledge)"]),
        (
            {"num_task_types": 3, "expert_groups": [1, 2, 3], "task_type_names": ["a", "b", "<c>"]},
            ["expert 0: task type a", "experts 1-2: task type b", "experts 3-5: task type &lt;c&gt;"],
        ),
        ({"lora_nums": 3, "blc_weight": 0}, ["expert 0", "expert 1", "expert 2"]),
        (
            {"lora_nums": 3, "lora_null_expert": True},
            ["experts 0-2: task type 0 (other tasks)", "null expert: task type 1 (world knowledge)"],
        ),
        ({"lora_nums": 1, "lora_null_expert": True, "num_task_types": 1}, ["expert 0", "null expert"]),
    ],
)
def test_the_legend_names_the_groups(settings, names):
    html = demo.legend_html(LoraConfig(**settings))
    assert [part.split("</span>")[0].split(">")[1] for part in html.split('<span class="key')[1:]] == names


def test_many_groups_differ_in_line_or_colour():
    styles = [line.split("{")[1] for line in demo.CSS.splitlines() if line.startswith(".group-")]
    assert len(set(styles)) == len(styles) == 16


def test_text_is_never_markup():
    bad = "<img src=x onerror=alert(1)>\"'&"
    routing = TokenRouting(["a"], torch.tensor([[[0.6, 0.4]]]))
    for answer in (demo.Answer([bad], None), demo.Answer([bad], routing)):
        exchange = demo.Exchange(bad, {demo.BASE: answer})
        html = demo.conversations_html({demo.BASE: bad}, [exchange], demo.MEAN, LoraConfig(lora_nums=2))
        assert "<img" not in html
        assert html.count("&lt;img src=x onerror=alert(1)&gt;&quot;&#x27;&amp;") == 3


def test_each_model_continues_its_own_conversation(answerer, capsys, adapter_dir, monkeypatch):
    stages = list(demo.ask(answerer, [], "the cat"))
    assert [set(each[-1].answers) for each in stages] == [set(), {demo.BASE}, {demo.BASE, demo.ADAPTED}]
    (exchange,) = stages[-1]
    generate.main(
        [
            *("--adapter", str(adapter_dir), "--template", "chat", "--max_new_tokens", "6"),
            *("--prompt", "the cat", "--compare_base"),
        ]
    )
    texts = {name: "".join(answer.texts) for name, answer in exchange.answers.items()}
    shown = generate.answer_lines({name: text.strip() for name, text in texts.items()})
    assert capsys.readouterr().out.endswith("\n".join(shown) + "\n")
    assert texts[demo.BASE] != texts[demo.ADAPTED]
    routing = exchange.answers[demo.ADAPTED].routing
    assert routing.weights_TLE.shape == (len(exchange.answers[demo.ADAPTED].texts), 6, 4)
    assert exchange.answers[demo.BASE].routing is None

    seen = []
    monkeypatch.setattr(demo, "encode_conversation", lambda _, turns: seen.append(turns) or (turns, [5, 6]))
    interrupted = demo.Exchange("lost", {demo.BASE: exchange.answers[demo.BASE]})
    next(demo.ask(answerer, [exchange, interrupted], "the dog"))
    contents = [[turn["content"] for turn in turns] for turns in seen]
    assert contents[0] == ["the cat", texts[demo.BASE], "lost", texts[demo.BASE], "the dog"]
    assert contents[1] == ["the cat", texts[demo.ADAPTED], "the dog"]
    assert list(demo.ask(answerer, [exchange], " \n")) == [[exchange]]
    answerer.template = "plain"
    next(demo.ask(answerer, [exchange], "the dog"))
    assert [len(turns) for turns in seen[2:]] == [1, 1]


def test_without_gradio_it_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "environ", os.environ.copy())
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"needs Gradio.*\n.* -m pip install --target .*-r .*requirements-demo.txt$"):
        demo.main(["--adapter", str(tmp_path / "nowhere")])
    assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"
    assert "127.0.0.1" in os.environ["no_proxy"].split(",")


def test_a_port_in_use_is_refused_before_the_model_is_loaded(start, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=rf"^--port {port}: Address already in use; choose another$"):
            start("--port", port, adapter=tmp_path / "nowhere")


def test_mistakes_are_named(start, tmp_path, model_dir):
    port = free_port()
    with pytest.raises(InputError, match=r"--adapter .*nowhere: no such folder"):
        start("--port", port, adapter=tmp_path / "nowhere")
    with pytest.raises(InputError, match="--port is 0, but has to be from 1 to 65535"):
        start("--port", 0)
    filled_model(lora_nums=1, base_model_name_or_path=str(model_dir)).save_pretrained(tmp_path / "one")
    for folder in (model_dir, tmp_path / "one"):
        with pytest.raises(InputError, match="does not have a router, so there is nothing to look into"):
            start("--port", port, adapter=folder)


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    """A folder with Gradio, installed as the message says, and with playwright."""
    folder = tmp_path_factory.mktemp("packages")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(folder)]
    subprocess.run([*install, "-r", str(ROOT / "requirements-demo.txt"), PLAYWRIGHT], check=True, timeout=600)
    return folder


@pytest.fixture
def page_url(packages, adapter_dir):
    """The address of the page of a tiny model; at the end Ctrl-C stops the program, which has not called anybody."""
    program = f"import pathlib, scripts.demo as d; d.PACKAGES = pathlib.Path({str(packages)!r}); d.run_verb(d.main)"
    flags = ["--adapter", adapter_dir, "--port", free_port(), "--template", "chat", "--max_new_tokens", 12]
    command = [sys.executable, "-c", program, *map(str, flags)]
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        address = f"http://127.0.0.1:{proxy.getsockname()[1]}"
        variables = environment(http_proxy=address, https_proxy=address, all_proxy=address, no_proxy="")
        process = subprocess.Popen(command, cwd=ROOT, env=variables, stdout=subprocess.PIPE, text=True)
        try:
            line = process.stdout.readline()
            assert line.startswith("The page is at http://127.0.0.1:"), line
            yield line.split()[4]
        finally:
            process.send_signal(signal.SIGINT)
            try:
                assert process.wait(timeout=30) == 0
            finally:
                process.kill()
        proxy.setblocking(False)
        with pytest.raises(BlockingIOError):
            proxy.accept()


@pytest.fixture
def browser(packages, monkeypatch):
    """Headless Chromium: that of the system, or else playwright's."""
    monkeypatch.setattr(sys, "path", [*sys.path, str(packages)])
    from playwright.sync_api import Error, sync_playwright

    installed = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(executable_path=installed, args=["--no-sandbox"])
        except Error:
            if installed:
                raise
            pytest.skip("there is no Chromium: install it with the system's packages or playwright")
        yield browser
        browser.close()


def say(page, text: str) -> None:
    """Send a message and wait for both answers."""
    answers = page.locator(".answer").count() + 2
    page.get_by_label("message").fill(text)
    page.get_by_label("message").press("Enter")
    page.wait_for_function(f"document.querySelectorAll('.answer').length == {answers}")
    page.wait_for_function("[...document.querySelectorAll('.answer')].every(each => each.textContent != '…')")


@pytest.mark.slow
@pytest.mark.parametrize(("width", "height", "scheme"), LOOKS)
def test_the_page_in_a_browser(page_url, browser, width, height, scheme, tmp_path):
    page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
    requests = []
    page.on("request", lambda request: requests.append(request.url))
    page.goto(page_url)
    say(page, "the cat <b>sat</b> ${value} {{value}}")
    say(page, "the dog")
    base, adapted = page.locator(".conversation").all()
    assert base.locator(".question").first.inner_text() == "the cat <b>sat</b> ${value} {{value}}"
    assert base.locator(".token").count() == 0
    tokens = adapted.locator(".token")
    assert tokens.count() > 5
    colours = "nodes => nodes.map(node => getComputedStyle(node).borderBottomColor)"
    keys = page.locator(".key").evaluate_all(colours)
    assert keys == ["rgb(0, 114, 178)", "rgb(213, 94, 0)"]
    assert set(tokens.evaluate_all(colours)) <= set(keys)

    tokens.nth(2).hover()
    tip = tokens.nth(2).evaluate("node => getComputedStyle(node, '::after').content")
    assert "experts 0-1: " in tip
    assert "by expert: 0: " in tip
    page.screenshot(path=tmp_path / "page.png", full_page=True)
    print(tmp_path / "page.png")
    assert page.evaluate("document.documentElement.scrollWidth") <= width

    page.get_by_label("adapted Linear").click()
    page.get_by_role("option", name="model.layers.1.mlp.down_proj").click()
    page.wait_for_function(f"!document.body.innerHTML.includes({tokens.nth(2).get_attribute('data-weights')!r})")
    page.get_by_label("message").fill("the cat " * 200)
    page.get_by_label("message").press("Enter")
    page.get_by_text("not answered: a prompt has").first.wait_for()
    assert page.locator(".answer").count() == 4
    page.get_by_role("button", name="New conversation").click()
    page.wait_for_function("document.querySelectorAll('.answer').length == 0")
    assert requests
    assert all(url.startswith((page_url, "data:", "blob:")) for url in requests)
