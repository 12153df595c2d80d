"""The verb `generate`: prompts, files that are gone on with, conversations."""

import datetime
import io
import json

import pyarrow
import pyarrow.parquet
import pytest
import torch
from conftest import THINKING, example_rows, filled_model, full_disk, tiny_tokenizer

from data import AnswerFile, InputError, encode_prompt, encode_turns
from inference.generation import DecodingArguments, batches_by_length, generate_answers
from loading.lock import locked
from scripts import generate
from transformers_patch import AutoModelForCausalLM

ROWS = example_rows(10)


@pytest.fixture
def run(adapter_dir, capsys):
    """Calls the program; returns what it printed."""

    def call(*flags: str, adapter=adapter_dir) -> str:
        generate.main(["--adapter", str(adapter), "--max_new_tokens", "6", *map(str, flags)])
        return capsys.readouterr().out

    return call


@pytest.fixture
def prompts_file(tmp_path):
    file = tmp_path / "prompts.json"
    # Answers are not needed, and fields that nobody knows are kept.
    file.write_text(json.dumps([{"instruction": row["instruction"], "input": row["input"], "id": 7} for row in ROWS]))
    return file


def alone(model, prompt: list[int], new_tokens: int = 6) -> list[int]:
    """Greedy answer without batch, padding or cache."""
    ids = torch.tensor([prompt])
    for _ in range(new_tokens):
        with torch.no_grad():
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
        if ids[0, -1] == 1:
            break
    return ids[0, len(prompt) :].tolist()


def test_batched_answers_are_those_of_each_prompt_alone():
    model, tokenizer = filled_model().eval(), tiny_tokenizer()
    prompts = [encode_prompt(tokenizer, "plain", row["instruction"], row["input"]) for row in ROWS]
    assert len({len(prompt) for prompt in prompts}) > 3
    settings = DecodingArguments(max_new_tokens=6).settings(pad_token_id=1, end_tokens=[1])
    assert generate_answers(model, prompts, settings) == [alone(model, prompt) for prompt in prompts]


def test_an_answer_ends_with_its_end_token():
    model = filled_model().eval()
    prompts = [[5, 6, 7], [9, 10]]
    first = alone(model, prompts[0])
    settings = DecodingArguments(max_new_tokens=6).settings(pad_token_id=1, end_tokens=[1, first[2]])
    assert generate_answers(model, prompts, settings)[0] == first[: first.index(first[2]) + 1]


def test_batches_are_of_similar_length_the_longest_first():
    assert batches_by_length([3, 9, 1, 9, 4], 2) == [[1, 3], [4, 0], [2]]


def test_a_prompt_is_answered_alike_each_time_and_with_a_seed_when_drawn(run):
    assert run("--prompt", "the cat") == run("--prompt", "the cat")
    drawn = [run("--prompt", "the cat", "--temperature", 2, "--seed", seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_compare_base_shows_both(run):
    lines = run("--prompt", "the cat", "--compare_base")
    assert lines.index("--- base") < lines.index("--- adapter")
    base, adapter = lines.removeprefix("--- base\n").split("--- adapter\n")
    assert base != adapter
    assert adapter == run("--prompt", "the cat")


def test_a_file_is_answered_in_its_order(run, prompts_file, tmp_path, adapter_dir, model_dir):
    output = tmp_path / "new" / "answers.jsonl"
    assert "10 answers" in run("--input", prompts_file, "--output", output, "--batch_size", 3, "--compare_base")
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["instruction"] for row in rows] == [row["instruction"] for row in ROWS]
    assert {tuple(row) for row in rows} == {("instruction", "input", "id", "generated", "generated_by_base")}
    model, tokenizer = filled_model().eval(), tiny_tokenizer()
    for row in rows:
        expected = alone(model, encode_prompt(tokenizer, "plain", row["instruction"], row["input"]))
        assert row["generated"] == tokenizer.decode(expected, skip_special_tokens=True).strip()
    assert not list(output.parent.glob("*.partial"))


def test_conversations_are_answered_after_their_last_question(run, tmp_path):
    """Whatever the format; an answer that is there is not read."""
    turns = [("user", "the cat"), ("assistant", "sat"), ("user", "the dog ?"), ("assistant", "lay")]
    messages = [{"role": role, "content": content} for role, content in turns]
    sharegpt = [{"from": {"user": "human"}.get(role, "gpt"), "value": content} for role, content in turns]
    rows = [{"messages": messages}, {"messages": messages[:3], "id": 1}, {"conversations": sharegpt}]
    rows += [{"prompt": messages[:3], "completion": None}, {"prompt": "the cat"}]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    output = tmp_path / "answers.json"
    run("--input", tmp_path / "rows.json", "--output", output, "--template", "chat")
    answers = json.loads(output.read_text())
    model, tokenizer = filled_model().eval(), tiny_tokenizer()
    for count, same in ((3, answers[:4]), (1, answers[4:])):
        expected = alone(model, encode_turns(tokenizer, "chat", messages[:count]))
        assert {row["generated"] for row in same} == {tokenizer.decode(expected, skip_special_tokens=True).strip()}
    with pytest.raises(InputError, match=r"--input: row 1: a prompt is a conversation \(user, assistant, user\), but"):
        run("--input", tmp_path / "rows.json", "--output", output, "--template", "plain")


@pytest.mark.parametrize("flags", [(), ("--temperature", "1.5", "--seed", "4")], ids=["greedy", "drawn"])
def test_an_interrupted_file_is_gone_on_with(run, prompts_file, tmp_path, monkeypatch, flags):
    """Killed after two batches, with an incomplete last line: only the rest is answered."""
    complete, output = tmp_path / "complete.json", tmp_path / "answers.json"
    run("--input", prompts_file, "--output", complete, "--batch_size", 3, *flags)
    calls = []
    answers = generate.Answerer.answers

    def counted(self, prompts, offset=0):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(len(prompts))
        return answers(self, prompts, offset)

    monkeypatch.setattr(generate.Answerer, "answers", counted)
    with pytest.raises(KeyboardInterrupt):
        run("--input", prompts_file, "--output", output, "--batch_size", 3, *flags)
    partial = tmp_path / "answers.json.partial"
    assert not output.exists()
    assert len(partial.read_text().splitlines()) == 1 + 6
    partial.write_bytes(partial.read_bytes()[:-4])
    calls[:] = [0, 0, 0]
    run("--input", prompts_file, "--output", output, "--batch_size", 3, *flags)
    assert calls[3:] == [3, 3, 1]
    assert output.read_text() == complete.read_text()
    assert not partial.exists()


def test_a_file_that_another_process_writes_is_refused(run, prompts_file, tmp_path):
    output = tmp_path / "new" / "answers.json"
    with locked(output, ""), pytest.raises(InputError, match="is being written by another process"):
        run("--input", prompts_file, "--output", output)
    assert not output.exists()
    run("--input", prompts_file, "--output", output)
    assert output.exists()


def test_half_a_file_of_another_command_is_refused(run, prompts_file, tmp_path):
    output = tmp_path / "answers.json"
    (tmp_path / "answers.json.partial").write_text('{"seed": 3}\n')
    with pytest.raises(InputError, match="seed: 3 there, 0 now") as caught:
        run("--input", prompts_file, "--output", output)
    assert "max_new_tokens: None there, 6 now" in str(caught.value)
    assert (tmp_path / "answers.json.partial").read_text() == '{"seed": 3}\n'


def test_half_a_file_of_other_rows_is_refused(tmp_path):
    AnswerFile(tmp_path / "a.json", [{"instruction": "one"}], {"seed": 0}).append({0: {"generated": "x"}})
    assert AnswerFile(tmp_path / "a.json", [{"instruction": "one"}], {"seed": 0}).answers == {0: {"generated": "x"}}
    with pytest.raises(InputError, match="rows_sha256"):
        AnswerFile(tmp_path / "a.json", [{"instruction": "two"}], {"seed": 0})


def test_incomplete_settings_are_not_resumed_from(tmp_path):
    AnswerFile(tmp_path / "a.json", [{"instruction": "one"}], {"seed": 0})
    partial = tmp_path / "a.json.partial"
    complete = partial.read_bytes()
    for incomplete in (complete[:20], complete[:-1]):
        partial.write_bytes(incomplete)
        assert AnswerFile(tmp_path / "a.json", [{"instruction": "one"}], {"seed": 0}).answers == {}
        assert partial.read_bytes() == complete


def test_a_full_disk_is_one_message_and_the_answers_before_are_gone_on_with(tmp_path):
    rows = [{"instruction": "one"}, {"instruction": "two"}]
    file = AnswerFile(tmp_path / "a.json", rows, {"seed": 0})
    file.append({0: {"generated": "x"}})
    message = "a.json cannot be written: File too large; once it can, the same command goes on"
    with full_disk(200), pytest.raises(InputError, match=message):
        file.append({1: {"generated": "y" * 200}})
    file = AnswerFile(tmp_path / "a.json", rows, {"seed": 0})
    assert file.answers == {0: {"generated": "x"}}
    file.append({1: {"generated": "y" * 200}})
    with full_disk(200), pytest.raises(InputError, match=message):
        file.finish()
    file = AnswerFile(tmp_path / "a.json", rows, {"seed": 0})
    file.finish()
    assert json.loads((tmp_path / "a.json").read_text())[1] == {"instruction": "two", "generated": "y" * 200}


def test_fields_that_cannot_be_written_are_refused_before_the_model_is_loaded(run, tmp_path):
    surrogate, times = tmp_path / "prompts.json", tmp_path / "prompts.parquet"
    surrogate.write_text(json.dumps([{"instruction": "x", "note": ["\ud800"]}]))
    table = pyarrow.Table.from_pylist([{"instruction": "x", "asked": datetime.datetime(2024, 1, 1)}])
    pyarrow.parquet.write_table(table, times)
    numbers = tmp_path / "prompts.jsonl"
    numbers.write_text('{"instruction": "x", "score": [NaN]}')
    for file, field in ((surrogate, "note"), (times, "asked"), (numbers, "score")):
        with pytest.raises(InputError, match=f"row 1: '{field}' cannot be written as JSON"):
            run("--input", file, "--output", tmp_path / "y.json", adapter=tmp_path)


def test_a_conversation_remembers_with_a_chat_template_and_forgets_on_reset(run, monkeypatch):
    seen = []
    conversation = generate.encode_conversation

    def recorded(answerer, turns):
        seen.append([turn["role"] for turn in turns])
        return conversation(answerer, turns)

    monkeypatch.setattr(generate, "encode_conversation", recorded)
    monkeypatch.setattr("sys.stdin", io.StringIO("the cat\n\nthe dog\n/reset\nthe mat\n/exit\nnever\n"))
    printed = run("--chat", "--template", "chat")
    assert seen == [["user"], ["user", "assistant", "user"], ["user"]]
    assert "/reset forgets" in printed
    assert len(printed.splitlines()) >= 4
    seen.clear()
    monkeypatch.setattr("sys.stdin", io.StringIO("the cat\nthe dog\n"))
    assert "each line is a separate prompt" in run("--chat")
    assert seen == [["user"], ["user"]]


def test_a_conversation_longer_than_the_context_loses_its_beginning(adapter_dir):
    trained = generate.load_trained(generate.InferenceArguments(adapter=str(adapter_dir)))
    args = generate.GenerateArguments(chat=True, template="chat")
    answerer = generate.Answerer(trained, DecodingArguments(max_new_tokens=6), args)
    turns = [{"role": role, "content": "the cat " * 20} for role in ("user", "assistant") * 4]
    turns.append({"role": "user", "content": "the dog"})
    turns, ids = generate.encode_conversation(answerer, turns)
    assert len(ids) + 6 <= 256
    assert 1 < len(turns) < 9
    assert turns[-1]["content"] == "the dog"


def test_a_conversation_does_not_think(adapter_dir):
    trained = generate.load_trained(generate.InferenceArguments(adapter=str(adapter_dir)))
    trained.tokenizer.chat_template = THINKING
    args = generate.GenerateArguments(chat=True, template="chat")
    answerer = generate.Answerer(trained, DecodingArguments(max_new_tokens=6), args)
    turns = [{"role": role, "content": text} for role, text in (("user", "a"), ("assistant", "b"), ("user", "c"))]
    _, ids = generate.encode_conversation(answerer, turns)
    assert trained.tokenizer.decode(ids) == "<|user|>a</s><|assistant|>b</s><|user|>c</s><|assistant|>(thought: )"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "exactly one of --prompt, --input and --chat"),
        (("--prompt", "x", "--chat"), "exactly one of --prompt, --input and --chat"),
        (("--input", "x.json"), "belong together"),
        (("--input", "x.json", "--output", "y.txt"), "has to end in .json or .jsonl"),
        (("--chat", "--compare_base"), "cannot show two answers"),
        (("--prompt", "x", "--template", "odd"), "--template is 'odd', but has to be one of auto, plain, chat"),
        (("--prompt", "x", "--top_k", "5"), "need a --temperature above 0"),
        (("--input", "nowhere.json", "--output", "y.json"), "no such file or folder"),
        (("--prompt", "the cat " * 200), "the model reads at most 255"),
        (("--prompt", "caf\udce9"), "--prompt has a byte that is not UTF-8"),
    ],
)
def test_mistakes_are_named(run, flags, message):
    with pytest.raises(InputError, match=message):
        run(*flags)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "the file is empty"),
        ("[]", "does not contain any rows"),
        ('[{"input": "x"}, 3]', r"row 1: has no 'instruction'"),
    ],
)
def test_a_bad_prompt_file_is_refused_before_the_model_is_loaded(run, tmp_path, content, message):
    file = tmp_path / "prompts.json"
    file.write_text(content)
    with pytest.raises(InputError, match=message):
        run("--input", file, "--output", tmp_path / "y.json", adapter=tmp_path)


def test_the_first_bad_prompts_are_listed_and_fields_that_are_not_read_may_be_anything(tmp_path):
    file = tmp_path / "prompts.json"
    file.write_text(json.dumps([{"question": "x"}] * 30))
    with pytest.raises(InputError, match=r"row 10: has no 'instruction'.*\n... and perhaps more") as caught:
        generate.load_prompts(file)
    assert len(str(caught.value).splitlines()) == 11
    rows = [{"instruction": "x", "Task": 3, "task": 1, "task_type": "nli", "aliases": "y", "alias": 1, "ouput": None}]
    file.write_text(json.dumps([*rows, {"instruction": "x", "Task types": 1, "Aliases": 2, "outputs": "x"}]))
    assert len(generate.load_prompts(file)) == 2


def test_answers_and_conversations_stop_where_the_positions_end(gpt2_dir, tmp_path, monkeypatch, capsys):
    adapter, long = ["--adapter", str(gpt2_dir), "--max_new_tokens", "256"], "the cat " * 40
    generate.main([*adapter, "--prompt", "the cat"])
    (tmp_path / "rows.json").write_text(json.dumps([{"instruction": "the cat"}, {"instruction": "a dog"}]))
    generate.main([*adapter, "--input", str(tmp_path / "rows.json"), "--output", str(tmp_path / "answers.json")])
    with pytest.raises(InputError, match=r"a prompt has .* tokens, but the model reads at most 63"):
        generate.main([*adapter, "--prompt", long])
    capsys.readouterr()
    seen = []
    answers = generate.generate_answers
    monkeypatch.setattr(generate, "generate_answers", lambda *args: seen.append(len(args[1][0])) or answers(*args))
    monkeypatch.setattr("sys.stdin", io.StringIO(f"cat\ndog\n{long}\nmat\n"))
    generate.main([*adapter[:-1], "12", "--chat", "--template", "chat"])
    assert "not sent: a prompt has" in capsys.readouterr().out
    assert len(seen) == 3
    assert seen[0] < seen[1] <= 64 - 12


def test_a_long_neighbour_does_not_shorten_an_answer(gpt2_dir):
    model = AutoModelForCausalLM.from_pretrained(gpt2_dir).eval()
    settings = DecodingArguments(max_new_tokens=30).settings(pad_token_id=1, end_tokens=[299])
    prompts = [[5, 6, 7], list(range(4, 66)), [9, 10], list(range(10, 60))]
    answers = generate_answers(model, prompts, settings)
    assert [len(answer) for answer in answers] == [30, 2, 30, 14]
    assert answers == [generate_answers(model, [prompt], settings)[0] for prompt in prompts]


def test_a_line_that_is_not_utf8_is_not_sent_and_the_conversation_goes_on(run, monkeypatch):
    stdin = io.TextIOWrapper(io.BytesIO(b"caf\xe9\nthe cat\n"), encoding="utf-8")
    monkeypatch.setattr("sys.stdin", stdin)
    monkeypatch.setattr(generate, "generate_answers", lambda *args: [tiny_tokenizer()("sat")["input_ids"]])
    seen = []
    encode = generate.encode_question
    monkeypatch.setattr(generate, "encode_question", lambda *args: seen.append(args[2].messages) or encode(*args))
    assert run("--chat").count("not sent: the prompt has a byte that is not UTF-8") == 1
    assert [turns[0]["content"] for turns in seen] == ["caf\udce9", "the cat"]


def test_answers_never_become_prompts(run, prompts_file, tmp_path):
    for output, message in ((tmp_path / "answers.jsonl", "would be read as input"), (prompts_file, "the input itself")):
        with pytest.raises(InputError, match=message):
            run("--input", tmp_path if output != prompts_file else prompts_file, "--output", output)
    (tmp_path / "link.json").symlink_to(tmp_path / "nowhere.json")
    with pytest.raises(InputError, match=r"is a link to .*nowhere.json, which does not exist"):
        run("--input", prompts_file, "--output", tmp_path / "link.json")


def test_the_fields_that_are_named_are_the_rows_own(run, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"dialog": []}')
    with pytest.raises(InputError, match=r"row 1: has no 'instruction' .*; its fields are 'dialog'$"):
        run("--input", tmp_path / "rows.jsonl", "--output", tmp_path / "out" / "y.json")
