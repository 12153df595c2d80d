"""The verb `evaluate`: teacher forcing against decoding, labels, groups, the file, the harness, bad input."""

import json
import math
import re
import sys
import types
from functools import partial

import pytest
import torch
from conftest import ROOT, THINKING, example_rows, fill_adapter, filled_model, tiny_config, tiny_tokenizer
from tokenizers import processors

from data import (
    Collator,
    Conversation,
    InputError,
    encode_answer,
    encode_prompt,
    encode_target,
    encode_turns,
)
from inference.evaluation import METRICS, label_tasks
from inference.generation import DecodingArguments, generate_answers
from inference.metrics import TEXT_METRICS
from inference.scoring import most_likely_options, score_answers
from inference.trained import InferenceArguments, TrainedModel, load_trained
from peft import LoraConfig, get_peft_model
from scripts import evaluate
from transformers_patch import LlamaLoRAMoEForCausalLM

ROWS = example_rows(12)


def encoded(rows: list[dict], tokenizer, template: str = "plain") -> list[dict]:
    found = []
    for row in rows:
        prompt = encode_prompt(tokenizer, template, row["instruction"], row["input"])
        target = encode_target(tokenizer, template, row["instruction"], row["input"], row["output"])
        found.append({"input_ids": [*prompt, *target], "spans": [len(prompt), len(prompt) + len(target)]})
    return found


@pytest.fixture(scope="module")
def learnt():
    """A model with an adapter that has learnt the first 4 rows by heart, and all rows; the base learns too, since a
    random one is of no help. Later rows have prompts of these, with other answers."""
    rows = encoded(ROWS, tiny_tokenizer())
    model = filled_model().requires_grad_(True).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.003)
    batch = Collator(1)([{**row, "task_type": -1, "source": ""} for row in rows[:4]])
    batch.pop("sources")
    for _ in range(400):
        model(**batch).lm_loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval(), rows


@pytest.fixture
def run(adapter_dir, tmp_path, capsys):
    """Calls the program; returns what it printed and the file."""

    def call(*flags: str, adapter=adapter_dir) -> tuple[str, dict]:
        output = tmp_path / "evaluation.json"
        common = ["--adapter", adapter, "--output", output, "--data_cache_dir", tmp_path / "cache"]
        evaluate.main([*map(str, common), *map(str, flags)])
        return capsys.readouterr().out, json.loads(output.read_text())

    return call


def test_the_teacher_forced_match_is_the_decoded_match(learnt):
    """On a model that gets some rows right, in batches padded on the right here and on the left there."""
    model, rows = learnt
    forced = [score.matches for score in score_answers(model, rows, 1, batch_size=5, progress=iter)]
    prompts = [row["input_ids"][: row["spans"][0]] for row in rows]
    targets = [row["input_ids"][row["spans"][0] :] for row in rows]
    settings = DecodingArguments(max_new_tokens=max(map(len, targets))).settings(pad_token_id=1, end_tokens=[1])
    decoded = generate_answers(model, prompts, settings)
    assert forced == [answer == target for answer, target in zip(decoded, targets, strict=True)]
    assert 3 < sum(forced) < len(rows)


def test_an_answer_right_but_for_its_end_is_no_match(learnt):
    model, rows = learnt
    right = [row for row, score in zip(rows, score_answers(model, rows, 1, 4, iter), strict=True) if score.matches]
    assert len(right) > 3
    longer = [{**row, "input_ids": [*row["input_ids"][:-1], 5, 1]} for row in right]
    assert not any(score.matches for score in score_answers(model, longer, 1, 4, iter))


def test_losses_do_not_depend_on_the_batch():
    rows = encoded(ROWS, tiny_tokenizer())
    model = filled_model().eval()
    for row, score in zip(rows, score_answers(model, rows, 1, 5, iter), strict=True):
        ids = torch.tensor([row["input_ids"]])
        labels = ids.clone()
        labels[0, : row["spans"][0]] = -100
        with torch.no_grad():
            alone = model(input_ids=ids, labels=labels).lm_loss
        assert score.tokens == len(row["input_ids"]) - row["spans"][0]
        assert score.nll / score.tokens == pytest.approx(alone.item(), rel=1e-4)


def test_the_likeliest_option_is_chosen(learnt):
    model, rows = learnt
    prompts = [row["input_ids"][: row["spans"][0]] for row in rows[:4]]
    options = [[row["input_ids"][row["spans"][0] :] for row in rows[:4]] for _ in prompts]
    assert most_likely_options(model, prompts, options, 1, 3, iter) == [0, 1, 2, 3]


def test_label_tasks_are_those_with_few_outputs():
    outputs = {"labels": ["yes", "no", "yes"], "open": ["a", "b", "c"], "": ["same", "same", "same"]}
    table = {
        "task": [task for task, each in outputs.items() for _ in each],
        "output": [output for each in outputs.values() for output in each],
    }
    assert label_tasks(table) == {"labels": ["no", "yes"]}


@pytest.fixture
def labelled_file(tmp_path):
    rows = [{**row, "aliases": [f"  The {row['output'].upper()}!"]} for row in ROWS]
    rows += [
        {"instruction": f"Is {number} even", "output": ("no", "yes")[number % 2 == 0], "task": "parity"}
        for number in range(5)
    ]
    file = tmp_path / "labelled.json"
    file.write_text(json.dumps(rows))
    return file


def test_every_metric_by_group_for_adapter_and_base(run, labelled_file):
    printed, report = run("--data", labelled_file, "--base", "--batch_size", 4)
    (found,) = report["data"]
    assert found["rows"] == 17
    assert found["label_tasks"] == {"parity": ["no", "yes"]}
    assert set(found["results"]) == {"adapter", "base"}
    for groups in found["results"].values():
        assert set(groups["by_task"]) == {"closed_book_qa", "parity", "summarization"}
        assert set(groups["by_task_type"]) == {"-1", "0", "1"}
        assert set(groups["all"]) == {"rows", *METRICS}
        assert "accuracy" not in groups["by_task"]["closed_book_qa"]
        for kind in ("by_task", "by_task_type"):
            assert sum(group["rows"] for group in groups[kind].values()) == 17
        for estimate in (value for name, value in groups["all"].items() if name != "rows"):
            assert set(estimate) == {"value", "low", "high"}
        loss, perplexity = groups["all"]["lm_loss"]["value"], groups["all"]["perplexity"]["value"]
        assert perplexity == pytest.approx(math.exp(loss))
        assert groups["all"]["accuracy"] == groups["by_task"]["parity"]["accuracy"]
    assert found["results"]["adapter"] != found["results"]["base"]
    for text in ("17 rows", "adapter", "base", "task parity", "task type 1", "all results are in"):
        assert text in printed


def test_decoded_metrics_know_aliases_and_teacher_forcing_does_not(run, labelled_file, monkeypatch):
    """With answers as the aliases have them, spelt otherwise than the expected ones."""
    tokenizer = tiny_tokenizer()
    by_prompt = {
        tuple(encode_prompt(tokenizer, "plain", row["instruction"], row["input"])): f"  THE {row['output']}"
        for row in ROWS
    }
    decode = partial(tokenizer, add_special_tokens=False)

    def answers(model, prompts, settings):
        return [decode(by_prompt.get(tuple(prompt), "none"))["input_ids"] for prompt in prompts]

    monkeypatch.setattr("inference.evaluation.generate_answers", answers)
    _, report = run("--data", labelled_file, "--metrics", *TEXT_METRICS)
    groups = report["data"][0]["results"]["adapter"]["by_task"]
    assert groups["closed_book_qa"]["exact_match"]["value"] == 1
    assert groups["closed_book_qa"]["rouge_l"]["value"] == 1
    assert groups["parity"]["exact_match"]["value"] == 0
    assert "token_exact_match" not in groups["parity"]


def test_the_same_seed_gives_the_same_file_and_the_runs_own_data_are_the_default(run, adapter_dir, data_file):
    config = json.loads((adapter_dir / "run_config.json").read_text())
    (adapter_dir / "run_config.json").write_text(json.dumps(config | {"validation_file": str(data_file)}))
    _, first = run()
    _, second = run("--data", data_file, "--batch_size", 3)
    assert first["data"][0]["path"] == str(data_file)
    first_all, second_all = (each["data"][0]["results"]["adapter"]["all"] for each in (first, second))
    for name in METRICS:
        if name in first_all:
            assert first_all[name] == pytest.approx(second_all[name], rel=1e-4)


def test_conversations_are_measured_by_all_of_their_answers(run, tmp_path):
    turns = [("user", "the cat"), ("assistant", "sat"), ("user", "the dog ?"), ("assistant", "lay")]
    messages = [{"role": role, "content": content} for role, content in turns]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps({"messages": messages[:end]}) for end in (4, 2)))
    _, report = run("--data", file, "--template", "chat", "--metrics", "lm_loss", "exact_match")
    model, tokenizer = filled_model().eval(), tiny_tokenizer()
    losses = []
    for end in (4, 2):
        ids = tokenizer.apply_chat_template(messages[:end], return_dict=False)
        logits = model(torch.tensor([ids])).logits[0].log_softmax(dim=-1)
        for answer in range(1, end, 2):
            start = len(encode_turns(tokenizer, "chat", messages[:answer]))
            stop = start + len(encode_answer(tokenizer, "chat", Conversation(messages[:answer]), turns[answer][1]))
            losses += [-logits[place - 1, ids[place]].item() for place in range(start, stop)]
    (results,) = report["data"]
    assert results["results"]["adapter"]["all"]["lm_loss"]["value"] == pytest.approx(
        sum(losses) / len(losses), rel=1e-5
    )


def test_several_files_are_measured_one_by_one(run, data_file, labelled_file):
    _, report = run("--data", data_file, labelled_file, "--metrics", "lm_loss", "--limit", 3)
    assert [each["path"] for each in report["data"]] == [str(data_file), str(labelled_file)]
    assert [each["results"]["adapter"]["all"]["rows"] for each in report["data"]] == [3, 3]


def test_the_harness_task_of_this_repository_runs_offline(run, monkeypatch):
    monkeypatch.chdir(ROOT)
    printed, report = run("--lm_eval", "tiny_data", "--limit", 2, "--base", "--template", "chat")
    for model in ("adapter", "base"):
        assert report["lm_eval"][model]["tiny_data"]["exact_match,none"] == 0
    assert re.search(r"adapter +tiny_data +exact_match +0", printed)


def test_the_harness_asks_in_the_adapters_template(adapter_dir):
    from inference.harness import TemplateLM

    trained = evaluate.load_trained(evaluate.InferenceArguments(adapter=str(adapter_dir)))
    trained.tokenizer.chat_template = THINKING
    turns = [{"role": "user", "content": "the cat"}]
    plain, chat = (TemplateLM(trained, template, 2) for template in ("plain", "chat"))
    for lm, template in ((plain, "plain"), (chat, "chat")):
        wanted = encode_prompt(trained.tokenizer, template, "the cat", "")
        assert lm.tok_encode(lm.apply_chat_template(turns)) == wanted


FEW_SHOT = [
    {"role": "user", "content": "the </s> cat"},
    {"role": "assistant", "content": "sat"},
    {"role": "user", "content": "the dog "},
]


@pytest.mark.parametrize("template", ["plain", "chat"])
def test_the_harness_asks_with_the_tokens_of_training(adapter_dir, template):
    from inference.harness import TemplateLM

    trained = evaluate.load_trained(evaluate.InferenceArguments(adapter=str(adapter_dir)))
    tokenizer = trained.tokenizer
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)]
    )
    tokenizer.chat_template = (
        "{% for turn in messages %}({{ turn.role }}) {{ turn.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}(assistant) {% endif %}"
    )
    lm = TemplateLM(trained, template, 2)

    context = lm.apply_chat_template(FEW_SHOT[:1])
    prompt = encode_prompt(tokenizer, template, "the </s> cat", "")
    target = encode_target(tokenizer, template, "the </s> cat", "", "sat")
    assert lm._encode_pair(context, "sat") == (prompt, target[:-1])
    assert prompt.count(0) == (template == "plain")
    batch, mask = lm.tok_batch_encode([context, lm.apply_chat_template(FEW_SHOT[2:])])
    assert batch[0].tolist() == prompt
    assert mask.sum(dim=1).tolist() == [len(prompt), len(encode_prompt(tokenizer, template, "the dog ", ""))]
    assert lm.tok_encode(context, left_truncate_len=3) == prompt[-3:]

    few = encode_turns(tokenizer, template, FEW_SHOT)
    assert lm.tok_encode(lm.apply_chat_template(FEW_SHOT)) == few
    ends = 1 if template == "plain" else 3
    assert few.count(1) == ends  # that of the text `</s>` is none
    begun = lm.apply_chat_template([*FEW_SHOT, {"role": "assistant", "content": "Answer: "}], False)
    letters = tokenizer("Answer: B", add_special_tokens=False)["input_ids"]
    asked, continued = lm._encode_pair(begun, "B")
    assert asked + continued == [*few, *letters]
    assert asked == lm.tok_encode(begun)


def test_a_prescribed_beginning_has_no_token_of_the_end_of_a_turn(adapter_dir):
    from inference.harness import TemplateLM

    trained = evaluate.load_trained(evaluate.InferenceArguments(adapter=str(adapter_dir)))
    trained.tokenizer.chat_template = (
        "{% for turn in messages %}<|{{ turn.role }}|>{{ turn.content }}\n--<|user|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% else %}{{ eos_token }}{% endif %}"
    )
    lm = TemplateLM(trained, "chat", 2)
    begun = lm.apply_chat_template([*FEW_SHOT[:1], {"role": "assistant", "content": "Answer: "}], False)
    letters = trained.tokenizer("Answer: B", add_special_tokens=False)["input_ids"]
    asked, continued = lm._encode_pair(begun, "B")
    assert asked + continued == [*encode_turns(trained.tokenizer, "chat", FEW_SHOT[:1]), *letters]
    assert asked == lm.tok_encode(begun)


def test_a_template_that_refuses_a_system_turn_is_asked_without(adapter_dir):
    from inference.harness import TemplateLM

    trained = evaluate.load_trained(evaluate.InferenceArguments(adapter=str(adapter_dir)))
    refuse = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
    trained.tokenizer.chat_template = refuse + trained.tokenizer.chat_template
    lm = TemplateLM(trained, "chat", 2)
    text = lm.apply_chat_template([{"role": "system", "content": "Be kind"}, {"role": "user", "content": "the cat"}])
    assert lm.tok_encode(text) == encode_prompt(trained.tokenizer, "chat", "the cat", "")


def test_packages_are_needed_by_their_own_metrics_alone(run, labelled_file, monkeypatch):
    for name in ("lm_eval", "sacrebleu", "rouge_score"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics", None)
    monkeypatch.delitem(sys.modules, "inference.harness", raising=False)
    _, report = run("--data", labelled_file, "--metrics", "lm_loss", "f1")
    assert set(report["versions"]) == {"torch", "transformers"}
    with pytest.raises(InputError, match="--lm_eval needs the package lm-eval"):
        run("--lm_eval", "tiny_data")


def test_a_report_over_its_own_data_is_refused(labelled_file, adapter_dir):
    folder = labelled_file.parent
    for data, output in ((labelled_file, labelled_file), (folder, folder / "report.json")):
        flags = map(str, ["--adapter", adapter_dir, "--data", data, "--output", output])
        with pytest.raises(InputError, match=r"--output .* (is the input itself|lies in the input folder)"):
            evaluate.main(list(flags))


def test_a_report_over_the_runs_own_data_is_refused(labelled_file, adapter_dir):
    (adapter_dir / "run_config.json").write_text(json.dumps({"validation_file": str(labelled_file)}))
    rows = labelled_file.read_bytes()
    with pytest.raises(InputError, match=r"labelled.json is the input itself"):
        evaluate.main(["--adapter", str(adapter_dir), "--output", str(labelled_file)])
    assert labelled_file.read_bytes() == rows


@pytest.mark.parametrize(
    "settings", [{"target_modules": ["lm_head"]}, {"modules_to_save": ["embed_tokens", "lm_head"]}]
)
def test_the_harness_takes_an_adapter_on_tied_embeddings(settings):
    """It ties the weights of every model that it is given."""
    from inference.harness import TemplateLM

    base = LlamaLoRAMoEForCausalLM(tiny_config(tie_word_embeddings=True))
    model = fill_adapter(get_peft_model(base, LoraConfig(**settings))).eval()
    ids = torch.tensor([[5, 6, 7]])
    expected = model(ids).logits
    lm = TemplateLM(TrainedModel(model, tiny_tokenizer(), {}, ""), "plain", 2)
    assert torch.equal(lm.model(ids).logits, expected)
    assert base.get_input_embeddings().weight is base.get_output_embeddings().weight


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--metrics", "rouge"), "--metrics rouge is not a metric; allowed are lm_loss"),
        (("--lm_eval", "tiny_dta"), "has no such task; did you mean .*tiny_data"),
        ((), "there is nothing to measure on"),
        (("--data", "nowhere.json"), "no such file or folder"),
        (("--limit", "0", "--seed", "-1"), "--limit is 0(.|\n)*--seed is -1"),
    ],
)
def test_mistakes_are_named(run, flags, message):
    with pytest.raises(InputError, match=message):
        run(*flags)


def test_labels_that_do_not_fit_after_every_prompt_are_refused_before_anything_is_measured(
    run, gpt2_dir, tmp_path, monkeypatch
):
    rows = [
        {"instruction": "x" * length, "output": label, "task": "size"} for length, label in ((50, "a"), (5, "a" * 30))
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows * 2))
    flags = "--data", tmp_path / "rows.json", "--template", "plain", "--metrics"
    run(*flags, "lm_loss", adapter=gpt2_dir)
    monkeypatch.setattr("inference.evaluation.score_answers", None)
    with pytest.raises(InputError, match=r"makes 82 tokens, but .* \(gpt2\) has 64 positions; .* from --metrics"):
        run(*flags, "lm_loss", "accuracy", adapter=gpt2_dir)


def test_bad_rows_and_label_tasks_that_do_not_exist(run, data_file, tmp_path):
    with pytest.raises(InputError, match="does not have a row of this task"):
        run("--data", data_file, "--label_tasks", "parity")
    bad = tmp_path / "bad.json"
    bad.write_text(json.dumps([{**ROWS[0], "aliases": "one"}, {**ROWS[1], "aliases": [1]}]))
    with pytest.raises(InputError, match="row 1: 'aliases' is \"one\", but has to be a list of strings") as caught:
        run("--data", bad)
    assert "row 2: 'aliases' is [1]" in str(caught.value)


def test_a_complete_model_is_measured_but_not_its_base(run, model_dir, data_file):
    _, report = run("--data", data_file, "--metrics", "lm_loss", adapter=model_dir)
    assert report["data"][0]["results"]["adapter"]["all"]["lm_loss"]["value"] > 0
    with pytest.raises(InputError, match="holds a complete model"):
        run("--data", data_file, "--base", adapter=model_dir)


def test_the_opencompass_wrapper_of_the_page(adapter_dir, monkeypatch):
    """Against a stand-in of the class that it extends."""

    class BaseModel:
        def __init__(self, path, max_seq_len, tokenizer_only, meta_template, generation_kwargs):
            self.max_seq_len = max_seq_len

    for name in ("opencompass", "opencompass.models", "opencompass.models.base"):
        monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(BaseModel=BaseModel))
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "EVALUATION.md").read_text(), re.DOTALL)
    names = {}
    exec(compile(block, "EVALUATION.md", "exec"), names)
    wrapped = names["LoRAMoE"](path=str(adapter_dir))
    assert len(wrapped.generate(["the cat", "a longer prompt"], max_out_len=4)) == 2
    (ppl,) = wrapped.get_ppl(["the cat sat on the mat"])
    ids = wrapped.tokenizer("the cat sat on the mat", return_tensors="pt")["input_ids"]
    assert ppl == pytest.approx(wrapped.model(input_ids=ids, labels=ids).lm_loss.item(), rel=1e-4)
    assert wrapped.get_ppl(["the cat sat on the mat"], mask_length=[5])[0] != pytest.approx(ppl)
    assert wrapped.get_token_len("the cat") == len(wrapped.tokenizer("the cat")["input_ids"])


def test_knowledge_is_compared_with_the_base_model(run, adapter_dir, model_dir, tmp_path):
    """The base model knows a fact if it is its own greedy answer."""
    trained = load_trained(InferenceArguments(str(model_dir)))
    prompt = encode_prompt(trained.tokenizer, "plain", "Where?", "")
    settings = DecodingArguments(max_new_tokens=24).settings(1, trained.end_tokens("plain"))
    (ids,) = generate_answers(trained.model, [prompt], settings)
    answer = trained.tokenizer.decode(ids, skip_special_tokens=True)
    rows = [{"prompt": "Where?", "completion": answer}, {"prompt": "Who?", "completion": "Nobody"}]
    rows.append({"prompt": "When?", "completion": "Then"})
    probe = tmp_path / "probe.json"
    probe.write_text(json.dumps(rows))
    flags = ("--knowledge", "--knowledge_probe", probe)
    out, report = run(*flags)
    found = report["knowledge"]
    assert (found["facts"], found["revealed"], found["known"]) == (3, 0, 1)
    assert found["kl_prompts"] > 0 < found["kl_text"]
    assert "the training rows are not known here" in out
    assert "world knowledge       1 of 3 facts known before, " in out
    assert report["data"] == []

    (tmp_path / "training.json").write_text(json.dumps([{"prompt": "When?", "completion": "Now"}]))
    config = json.loads((adapter_dir / "run_config.json").read_text())
    changed = config | {"dataset_dir": str(tmp_path / "training.json")}
    (adapter_dir / "run_config.json").write_text(json.dumps(changed))
    out, report = run(*flags)
    assert (report["knowledge"]["facts"], report["knowledge"]["revealed"]) == (2, 1)
    assert "; not asked: 1 that training rows reveal" in out
    assert "training.json has changed since the run" in out

    (adapter_dir / "run_config.json").write_text(json.dumps(config | {"knowledge_probe": str(probe), "probe_facts": 2}))
    out, report = run("--knowledge")
    assert (report["knowledge"]["probe"], report["knowledge"]["facts"]) == (str(probe), 2)
    _, report = run("--knowledge", "--probe_facts", 1)
    assert report["knowledge"]["facts"] == 1


def test_a_probe_that_asks_nothing_contradicts_the_wish_to_know(run):
    with pytest.raises(InputError, match="--knowledge contradicts --knowledge_probe none"):
        run("--knowledge", "--knowledge_probe", "none")


def test_knowledge_of_a_complete_model_needs_its_base_model(run, model_dir, tmp_path):
    probe = tmp_path / "probe.json"
    probe.write_text(json.dumps([{"prompt": "Where?", "completion": "here"}]))
    flags = ("--knowledge", "--knowledge_probe", probe, "--template", "plain")
    with pytest.raises(InputError, match="with its base model: name it with --base_model"):
        run(*flags, adapter=model_dir)
    _, report = run(*flags, "--base_model", model_dir, adapter=model_dir)
    assert report["knowledge"]["kl_prompts"] == report["knowledge"]["kl_text"] == 0
