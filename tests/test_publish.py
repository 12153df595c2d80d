"""The model card, and its upload: against a hub that answers from memory."""

import base64
import json
import re

import httpx2
import huggingface_hub
import pytest
from test_train import Runner

from data import InputError


class Hub:
    """Answers of the hub's HTTP interface to a client that makes a repository and commits to it.

    Attributes:
        files: content of each committed file by its path.
        refusals: status codes to answer with instead, by a part of the address.
    """

    def __init__(self):
        self.files: dict[str, bytes] = {}
        self.created: list[dict] = []
        self.tokens: set[str] = set()
        self.refusals: dict[str, int] = {}

    def __call__(self, request: httpx2.Request) -> httpx2.Response:
        if request.method == "POST":
            self.tokens.add(request.headers.get("authorization", ""))
        for part, status in self.refusals.items():
            if part in request.url.path:
                return httpx2.Response(status, json={"error": "refused"}, headers={"x-error-message": "refused"})
        body = request.read()
        if request.url.path == "/api/repos/create":
            self.created.append(json.loads(body))
            return httpx2.Response(200, json={"url": f"https://huggingface.co/someone/{self.created[-1]['name']}"})
        if "/preupload/" in request.url.path:
            files = [{**file, "uploadMode": "regular", "shouldIgnore": False} for file in json.loads(body)["files"]]
            return httpx2.Response(200, json={"files": files})
        if "/commit/" in request.url.path:
            self._commit(body)
            address = "https://huggingface.co/someone/run/commit/0123abc"
            return httpx2.Response(200, json={"commitUrl": address, "commitOid": "0123abc", "hookOutput": ""})
        return httpx2.Response(200, json={})

    def _commit(self, body: bytes) -> None:
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])


@pytest.fixture
def hub(monkeypatch):
    answers = Hub()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    huggingface_hub.set_client_factory(lambda: httpx2.Client(transport=httpx2.MockTransport(answers)))
    yield answers
    huggingface_hub.set_client_factory(lambda: httpx2.Client())
    huggingface_hub.close_session()


@pytest.fixture
def run(tmp_path, model_dir, monkeypatch) -> Runner:
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    return Runner(tmp_path, model_dir)


ONLINE = {"push_to_hub": True, "hub_token": "hf_secret", "max_steps": 2}


def test_a_finished_run_is_uploaded_without_optimizer_states_logs_or_paths(run, hub, model_dir, capsys):
    run(**ONLINE, save_steps=1)
    assert hub.files.keys() == {
        "README.md", "adapter_config.json", "adapter_model.safetensors", "chat_template.jinja", "routing.json",
        "routing.png", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    for name, content in hub.files.items():
        assert content == (run.output / name).read_bytes()
        assert b"hf_secret" not in content
        if name != "adapter_config.json":  # names the base model, which is a folder here
            assert str(run.folder).encode() not in content
            assert str(model_dir).encode() not in content
    assert [request["name"] for request in hub.created] == ["run"]
    assert hub.tokens == {"Bearer hf_secret"}
    shown = capsys.readouterr().out
    assert "uploaded to https://huggingface.co/someone/run" in shown
    assert "hf_secret" not in shown
    assert "hf_secret" not in (run.output / "run_config.json").read_text()


def test_all_chat_templates_of_a_tokenizer_are_uploaded_and_written_again(run, hub, tmp_path, tokenizer):
    tokenizer.chat_template = {"default": tokenizer.chat_template, "tools": tokenizer.chat_template}
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    settings = {**ONLINE, "tokenizer_name_or_path": tmp_path / "tokenizer"}
    run(**settings)
    further = "additional_chat_templates/tools.jinja"
    assert hub.files[further] == (tmp_path / "tokenizer" / further).read_bytes()
    (run.output / further).write_text("")
    (run.output / "all_results.json").unlink()
    run(**settings)
    assert (run.output / further).read_bytes() == hub.files[further]
    assert not list(run.output.glob(".*.tmp"))


def test_a_repository_that_cannot_be_opened_is_found_before_any_training(run, hub, monkeypatch):
    monkeypatch.setattr("train.build_model", lambda *arguments: pytest.fail("weights were read"))
    hub.refusals["/api/"] = 403
    with pytest.raises(InputError, match="--push_to_hub: the repository someone/mine cannot be opened"):
        run(**ONLINE, hub_model_id="someone/mine")
    with pytest.raises(InputError, match="--hub_strategy: --push_to_hub uploads a run once, after it has finished"):
        run(**ONLINE, hub_strategy="every_save")


def test_an_upload_that_failed_is_tried_again_by_the_same_command(run, hub, monkeypatch):
    hub.refusals["/commit/"] = 400
    with pytest.raises(InputError, match="the run is finished, but its upload to someone/run failed"):
        run(**ONLINE)
    assert (run.output / "all_results.json").is_file()
    hub.refusals.clear()
    monkeypatch.setattr("train.build_model", lambda *arguments: pytest.fail("trained again"))
    run(**ONLINE)
    assert "adapter_model.safetensors" in hub.files


def test_nothing_goes_to_the_hub_unasked(run, hub):
    run(max_steps=1)
    assert not hub.tokens


def table(card: str, heading: str) -> dict[str, list[str]]:
    """The rows of the table under a heading, by their first cell."""
    text = re.search(rf"## {heading}\n((?:\|.*\n)+)", card)[1]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()[2:]]
    return {first: rest for first, *rest in cells}


def test_the_card_tells_settings_data_metrics_routing_and_source(run):
    results = run()
    card = (run.output / "README.md").read_text()
    assert table(card, "Training")["learning_rate"] == ["0.01"]
    assert table(card, "Training")["dataset_dir"] == ["train.json"]
    data = table(card, "Data")
    assert data["rows"] == ["12", "5"]
    assert data["rows of task type 1"] == ["6", "3"]
    assert data["rows of summarization"] == ["6", "2"]
    assert int(data["tokens"][0]) > int(data["tokens of answers"][0]) > 12
    measured = table(card, "Measured")
    assert measured["eval_lm_loss_after"] == [f"{results['eval_lm_loss_after']:.4f}"]
    assert "](routing.png)" in card
    assert "@inproceedings{dou2024loramoe" in card
    assert str(run.folder) not in card


def test_the_card_takes_a_setting_that_is_no_path_for_what_it_is(run):
    """No file could have a name of more than 255 bytes: asking for one is an error."""
    parts = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "self_attn.q_proj", "self_attn.v_proj")
    names = ",".join(f"model.layers.{layer}.{part}" for layer in range(2) for part in parts)
    assert len(names) > 255
    run(max_steps=2, trainable=names)
    settings = table((run.output / "README.md").read_text(), "Training")
    assert set(settings["trainable"][0].split(",")) == set(names.split(","))
    assert settings["validation_file"] == ["test.json"]


def test_the_card_of_a_baseline_shows_no_routing(run):
    run(lora_nums=1, max_steps=1)
    card = (run.output / "README.md").read_text()
    assert card.count("LoRA adapter") == 1
    assert "routing.png" not in card
