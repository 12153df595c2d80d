"""The formats of rows: the same conversation in each gives the same tokens; bad rows are named."""

import csv
import json
import re
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from conftest import ROOT, tiny_tokenizer
from transformers import PreTrainedTokenizerBase

from data import Encoding, InputError, Reading, encode_conversations, load_data, marked_row
from data.chat_template import render_answers
from data.files import read_block, split_files
from data.formats import FORMATS, Conversation, find_format, to_conversation
from data.rows import row_problem

ENCODING = Encoding("chat", 256, 2)
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

QUESTION, ANSWER = "What is the capital of Kenya?", "Nairobi"
PAIR = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
# The same exchange in every format.
ROWS = {
    "instruction": {"instruction": "What is the capital", "input": "of Kenya?", "output": ANSWER},
    "dolly": {"instruction": "What is the capital", "context": "of Kenya?", "response": ANSWER, "category": "open_qa"},
    "prompt_completion": {"prompt": "What is the capital\nof Kenya?", "completion": ANSWER},
    "prompt_response": {"prompt": "What is the capital\nof Kenya?", "response": ANSWER, "prompt_id": "7"},
    "messages": {
        "messages": [{"role": "user", "content": "What is the capital\nof Kenya?"}, PAIR[1]],
        "prompt": "What is the capital",
    },
    "sharegpt": {
        "conversations": [
            {"from": "human", "value": "What is the capital\nof Kenya?"},
            {"from": "gpt", "value": ANSWER},
        ]
    },
}
LONG = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        *PAIR,
        {"role": "user", "content": "And of Chad?"},
        {"role": "assistant", "content": "N'Djamena"},
    ]
}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]
CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": 2}'}}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    return tokenizer


def load(rows: list[dict], tokenizer, folder: Path, encoding: Encoding = ENCODING, **reading):
    file = folder / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    return load_data(file, tokenizer, encoding, folder / "cache", reading=Reading(**reading))[0]


def read(row: dict) -> Conversation:
    return to_conversation(row, find_format(row))


def test_an_exchange_gives_the_same_tokens_in_every_format(tmp_path, tokenizer):
    wanted = tokenizer.apply_chat_template(ROWS["messages"]["messages"], return_dict=False)
    for template in ("chat", "plain"):
        rows = load(list(ROWS.values()), tokenizer, tmp_path, Encoding(template, 256, 2))
        assert len({tuple(ids) for ids in rows["input_ids"]}) == 1
        assert len(set(rows["prompt_hash"])) == 1
        assert rows["output"][:] == [ANSWER] * len(ROWS)
        if template == "chat":
            assert rows["input_ids"][0] == wanted[: len(rows["input_ids"][0])]
            assert marked_row(tokenizer, rows[0]) == (
                "<|im_start|>user\nWhat is the capital\nof Kenya?<|im_end|>\n"
                "<|im_start|>assistant\n[[Nairobi<|im_end|>]]"
            )


def test_a_table_may_hold_conversations_as_json(tmp_path, tokenizer):
    with (tmp_path / "rows.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([["messages"], [json.dumps(LONG["messages"])]])
    (row,) = load_data(tmp_path / "rows.csv", tokenizer, ENCODING, tmp_path / "cache")[0]
    assert json.loads(row["turns"]) == LONG["messages"][:4]


def test_a_conversation_gives_the_same_tokens_in_three_formats(tmp_path, tokenizer):
    turns = LONG["messages"]
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    sharegpt = {"conversations": [{"from": names[turn["role"]], "value": turn["content"]} for turn in turns]}
    with_system = {"system": "Be brief.", "conversations": sharegpt["conversations"][1:]}
    halves = {"prompt": turns[:4], "completion": turns[4:]}
    rows = load([LONG, sharegpt, with_system], tokenizer, tmp_path)
    shown = (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat is the capital of Kenya?<|im_end|>\n"
        "<|im_start|>assistant\n[[Nairobi<|im_end|>]]\n<|im_start|>user\nAnd of Chad?<|im_end|>\n"
        "<|im_start|>assistant\n[[N'Djamena<|im_end|>]]"
    )
    assert [marked_row(tokenizer, row) for row in rows] == [shown] * 3
    assert json.loads(rows[0]["turns"]) == turns[:4]
    only_last = shown.replace("[[Nairobi<|im_end|>]]", "Nairobi<|im_end|>")
    last = load([LONG], tokenizer, tmp_path, Encoding("chat", 256, 2, train_on="last"))
    split = load([halves, halves | {"completion": "N'Djamena"}], tokenizer, tmp_path)
    assert [marked_row(tokenizer, row) for row in (*last, *split)] == [only_last] * 3


def test_a_long_conversation_is_cut_and_its_last_answer_is_the_last_that_is_left(tmp_path, tokenizer):
    (whole,) = load([LONG], tokenizer, tmp_path)
    first_answer = whole["spans"][1]
    (cut,) = load([LONG], tokenizer, tmp_path, Encoding("chat", first_answer + 3, 2))
    assert cut["input_ids"] == whole["input_ids"][: first_answer + 3]
    assert cut["spans"] == whole["spans"][:2]
    assert (cut["output"], json.loads(cut["turns"])) == (ANSWER, LONG["messages"][:2])


@pytest.mark.parametrize(("answer", "counts"), [(2, [16]), (20, [16, 32]), (39, [16, 32, 40])])
def test_answers_after_the_limit_are_not_looked_for(tokenizer, monkeypatch, answer, counts):
    conversation = Conversation([*LONG["messages"][:1], *LONG["messages"][1:] * 20])
    (whole,) = encode_conversations(tokenizer, "chat", [conversation])
    most = whole.spans[2 * answer] + 1
    sought: list[int] = []

    def render(*args):
        sought.append(len(args[2]))
        return render_answers(*args)

    monkeypatch.setattr("data.prompt.render_answers", render)
    (cut,) = encode_conversations(tokenizer, "chat", [conversation], most=most)
    assert sought == counts
    assert cut.input_ids[:most] == whole.input_ids[:most]
    assert cut.spans[: 2 * answer + 2] == whole.spans[: 2 * answer + 2]


def test_what_a_source_says_holds_for_rows_that_do_not(tmp_path, tokenizer):
    rows = [{"question": "the cat", "answer": "sat"}, {"question": "the dog", "answer": "lay", "task_type": 0}]
    columns = {"prompt": "question", "completion": "answer", "aliases": "others"}
    found = load(rows, tokenizer, tmp_path, columns=columns, task_type=1, task="pets", prefix="zoo/")
    assert (found["task_type"][:], found["task"][:]) == ([1, 0], ["pets", "pets"])
    assert found["source"][:] == ["zoo/rows.jsonl row 1", "zoo/rows.jsonl row 2"]
    with pytest.raises(
        InputError, match=r"row 1: has no 'asked', which is mapped to 'prompt'; its fields are question, a"
    ):
        load(rows, tokenizer, tmp_path, columns={"prompt": "asked"})


def test_a_declared_format_decides_between_several(tmp_path, tokenizer):
    row = {"instruction": "the cat", "output": "sat", "response": "lay"}
    with pytest.raises(
        InputError, match=r"of several formats, instruction \(instruction, output\) and dolly \(instruct"
    ):
        load([row], tokenizer, tmp_path)
    for name, answer in (("alpaca", "sat"), ("instruction", "sat"), ("dolly", "lay")):
        assert load([row], tokenizer, tmp_path, format=name)["output"][:] == [answer]
    others = {"context": "here", "messages": PAIR, "prompt": "x", "completion": "y"}
    assert load([row | others], tokenizer, tmp_path, format="alpaca")["output"][:] == ["sat"]
    # A column that is empty does not count.
    assert read(row | {"response": ""}).messages[-1]["content"] == "sat"


def test_tools_are_shown_and_calls_are_learnt(tmp_path, tokenizer):
    turns = [
        {"role": "user", "content": "1 + 2?"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "3", "tool_call_id": "c1"},
        {"role": "assistant", "content": "It is 3."},
    ]
    wanted = [
        turns[0],
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [CALL | {"function": {"name": "add", "arguments": {"a": 1, "b": 2}}}],
        },
        turns[2],
        turns[3],
    ]
    for tools in (TOOLS, json.dumps(TOOLS)):
        conversation = read({"messages": turns, "tools": tools})
        assert (conversation.messages, conversation.tools) == (wanted, TOOLS)
    assert read({"messages": json.dumps(turns), "tools": json.dumps(TOOLS)}) == conversation
    sharegpt = [
        {"from": "human", "value": "1 + 2?"},
        {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1, "b": 2}}'},
        {"from": "observation", "value": "3"},
        {"from": "gpt", "value": "It is 3."},
    ]
    found = read({"conversations": sharegpt, "tools": json.dumps(TOOLS)}).messages
    assert [{k: v for k, v in turn.items() if k != "tool_call_id"} for turn in wanted][1]["tool_calls"][0][
        "function"
    ] == (found[1]["tool_calls"][0]["function"])
    template = (
        "{% if tools %}{{ '<|im_start|>tools\n' + (tools | tojson) + '<|im_end|>\n' }}{% endif %}"
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
        "{% for c in m.tool_calls or [] %}{{ '<call>' + (c.function | tojson) + '</call>' }}{% endfor %}"
        "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    tool_user = tiny_tokenizer()
    tool_user.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tool_user.chat_template = template
    rows = load([{"messages": turns, "tools": TOOLS}], tool_user, tmp_path)
    assert marked_row(tool_user, rows[0], 1000).endswith(
        '<|im_start|>assistant\n[[<call>{"name": "add", "arguments": {"a": 1, "b": 2}}</call><|im_end|>]]\n'
        "<|im_start|>tool\n3<|im_end|>\n<|im_start|>assistant\n[[It is 3.<|im_end|>]]"
    )
    cut = load([{"messages": turns[:2], "tools": TOOLS}], tool_user, tmp_path)
    assert json.loads(cut["output"][0])[0]["function"]["name"] == "add"


def test_fields_that_only_parquet_has_are_left_out(tmp_path):
    file = tmp_path / "rows.parquet"
    schemas = [{"name": name, "properties": {name: {"type": "string"}}} for name in ("city", "day")]
    calls = [{"function": {"name": name, "arguments": {"of": {name: "x"}}}} for name in ("city", "day")]
    turns = [PAIR[0], {"role": "assistant", "content": None, "tool_calls": calls}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"messages": turns, "tools": schemas}]), file)
    ((_, row),) = read_block(next(split_files([file])))
    assert row["tools"][0]["properties"] == {"city": {"type": "string"}, "day": None}
    assert read(row) == read({"messages": turns, "tools": schemas})
    assert read(row).tools == schemas


def test_parts_are_joined_trailing_turns_are_left_out_and_a_weight_of_0_is_not_learnt(tokenizer):
    row = {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "the "}, {"type": "text", "text": "cat"}]},
            {"role": "assistant", "content": "sat", "weight": 0},
            {"role": "user", "content": "where ?"},
            {"role": "assistant", "content": "on the mat", "weight": 1},
            {"role": "user", "content": "thanks"},
        ]
    }
    conversation = read(row)
    assert (len(conversation.messages), conversation.answers) == (4, [3])
    (encoded,) = encode_conversations(tokenizer, "chat", [conversation])
    shown = marked_row(tokenizer, {"input_ids": encoded.input_ids, "spans": encoded.spans})
    assert shown.count("[[") == 1
    assert shown.startswith("<|im_start|>user\nthe cat<|im_end|>\n<|im_start|>assistant\nsat<|im_end|>")
    assert shown.endswith("[[on the mat<|im_end|>]]")


def test_a_greeting_of_the_assistant_is_not_learnt(tokenizer):
    row = turns(("assistant", "Hello!"), ("user", "the cat"), ("assistant", "sat"))
    (encoded,) = encode_conversations(tokenizer, "chat", [read(row)])
    shown = marked_row(tokenizer, {"input_ids": encoded.input_ids, "spans": encoded.spans})
    assert shown.startswith("<|im_start|>assistant\nHello!<|im_end|>")
    assert shown.count("[[") == 1


def test_special_tokens_that_turns_spell_stay_text(tokenizer):
    turns = [
        {"role": "user", "content": "repeat <|im_end|>"},
        {"role": "assistant", "content": "<|im_end|> it is"},
        {"role": "user", "content": "again"},
        {"role": "assistant", "content": "no </s>"},
    ]
    (encoded,) = encode_conversations(tokenizer, "chat", [Conversation(turns)])
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert encoded.input_ids.count(end) == 4
    assert tokenizer.eos_token_id not in encoded.input_ids
    answers = [
        tokenizer.decode(encoded.input_ids[start:stop]) for start, stop in zip(*[iter(encoded.spans)] * 2, strict=True)
    ]
    assert answers == ["<|im_end|> it is<|im_end|>", "no </s><|im_end|>"]
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "<|im_end|>", "arguments": {}}}]}
    with pytest.raises(InputError, match="a tool, a tool call or reasoning contains a special token"):
        encode_conversations(tokenizer, "chat", [Conversation([turns[0], call], TOOLS)])


def turns(*pairs: tuple[str, object]) -> dict:
    return {"messages": [{"role": role, "content": content} for role, content in pairs]}


BAD = {
    "nothing known": (
        {"question": "x", "answer": "y"},
        r"has no 'instruction' \(formats begin with 'instruction', 'prom",
    ),
    "a known name where its format is not": (
        {"inputs": "x", "targets": "y"},
        r"has no 'instruction' .*; its fields are 'inputs', 'targets'",
    ),
    "text that is no JSON": ({"messages": "[{'role': 'user'}]"}, "'messages': not JSON"),
    "function_call": (
        {"messages": [PAIR[0], PAIR[1] | {"function_call": {"name": "add", "arguments": "{}"}}]},
        r"messages\[1\] has a 'function_call', which is not read: write it as 'tool_calls'",
    ),
    "empty conversation": ({"messages": []}, "'messages' is empty: a conversation has at least one turn"),
    "no list": ({"messages": "hello"}, "'messages': not JSON .*: \"hello\""),
    "a number": ({"messages": 3}, "'messages' is 3, but has to be a list of turns"),
    "no turn": (
        {"messages": ["hello"]},
        r"messages\[0\] is \"hello\", but has to be an object with role and content",
    ),
    "no content": ({"messages": [{"role": "user"}]}, r"messages\[0\] has no 'content'; its fields are 'role'"),
    "unknown role": (
        turns(("narrator", "x")),
        r"messages\[0\].role is \"narrator\", but has to be one of system, developer, user,",
    ),
    "unknown from": (
        {"conversations": [{"from": "narrator", "value": "x"}]},
        r"conversations\[0\].from is \"narrator\", but has to be one of",
    ),
    "no assistant": (
        turns(("user", "x"), ("user", "y")),
        "has no answer to train on in 'messages'",
    ),
    "answer alone": (turns(("assistant", "x"), ("user", "y")), "has no answer to train on in 'messages'"),
    "number as content": (turns(("user", 3)), r"the content of messages\[0\] is 3, but has to be a string"),
    "picture": (
        turns(("user", [{"type": "image_url", "image_url": "x"}])),
        r"messages\[0\] has a part that is not text: .*only text is supported",
    ),
    "system twice": (LONG | {"system": "Be kind."}, "has both a 'system' and a system turn: remove one of them"),
    "a number as prompt": ({"prompt": 3, "completion": [PAIR[1]]}, "'prompt' is 3, but has to be a string"),
    "context of a prompt": (
        ROWS["prompt_completion"] | {"context": "Africa"},
        "has a 'context', which is not read: add it to 'prompt', or remove the column",
    ),
    "empty answer": (turns(("user", "x"), ("assistant", " ")), r"messages\[1\] is an empty answer"),
    "weight": (
        {"messages": [PAIR[0], PAIR[1] | {"weight": 0.5}]},
        r"messages\[1\].weight is 0.5, but has to be 1, or 0",
    ),
    "call without tools": (
        {"messages": [PAIR[0], {"role": "assistant", "content": None, "tool_calls": [CALL]}]},
        r"uses a tool \(turn 1\), but has no 'tools' that describes it",
    ),
    "result without tools": (
        turns(("user", "x"), ("tool", "3"), ("assistant", "y")),
        r"uses a tool \(turn 1\), but has no",
    ),
    "call without name": (
        {"messages": [PAIR[0], {"role": "assistant", "tool_calls": [{"id": "x"}]}], "tools": TOOLS},
        r"messages\[1\].tool_calls\[0\] is .* but has to be a function with a name and arguments",
    ),
    "arguments": (
        {
            "messages": [PAIR[0], {"role": "assistant", "tool_calls": [{"name": "add", "arguments": "{1"}]}],
            "tools": TOOLS,
        },
        r"messages\[1\].tool_calls\[0\].arguments: not JSON .*\{1",
    ),
    "tools": ({"messages": PAIR, "tools": "add"}, r"'tools': not JSON"),
    "half a character in a tool": (
        {"messages": PAIR, "tools": [{"name": "\ud83d"}]},
        "'tools' holds half of a surrogate pair, which is not a character",
    ),
    "tools without end": (
        json.loads('{"messages": [], "tools": [' + '{"a":' * 800 + "1" + "}" * 800 + "]}") | {"messages": PAIR},
        r"'tools': not JSON \(maximum recursion depth exceeded.*\): \[\{\"a\": ",
    ),
    "tools as text": (
        {"messages": PAIR, "tools": ["add"]},
        r"'tools' is \[\"add\"\], but has to be a list of JSON schemas",
    ),
    "half a character in a call": (
        {
            "messages": [PAIR[0], {"role": "assistant", "tool_calls": [{"name": "add", "arguments": {"a": "\ud83d"}}]}],
            "tools": TOOLS,
        },
        r"messages\[1\].tool_calls\[0\].arguments holds half of a surrogate pair",
    ),
    "half a character in the id of a call": (
        {"messages": [PAIR[0], {"role": "assistant", "tool_calls": [CALL | {"id": "\ud83d"}]}], "tools": TOOLS},
        r"messages\[1\].tool_calls\[0\].id holds half of a surrogate pair",
    ),
    "the older spelling of a call": (
        {"messages": [PAIR[0], PAIR[1] | {"function_call": {"name": "add", "arguments": "{}"}}]},
        r"messages\[1\] has a 'function_call', which is not read: write it as 'tool_calls'",
    ),
    "half a character": (
        turns(("user", "a\ud83d"), ("assistant", "b")),
        r"the content of messages\[0\] holds half of a surr",
    ),
}


@pytest.mark.parametrize(("row", "message"), BAD.values(), ids=BAD)
def test_bad_rows_are_named(tmp_path, tokenizer, row, message):
    with pytest.raises(InputError, match=rf"rows.jsonl: row 2: {message}"):
        load([ROWS["messages"], row], tokenizer, tmp_path)


def test_what_the_template_refuses_is_named_by_row(tmp_path, tokenizer):
    strict = tiny_tokenizer()
    strict.chat_template = (
        "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}{{ m.content + eos_token }}{% endfor %}"
    )
    twice = turns(("user", "x"), ("assistant", "y"), ("assistant", "z"))
    with pytest.raises(
        InputError, match=r"rows.jsonl row 2: the tokenizer's chat template fails .*roles must alternate"
    ):
        load([ROWS["messages"], twice], strict, tmp_path)


def test_a_thought_that_the_template_does_not_show_is_refused(tmp_path, tokenizer):
    thought = {"messages": [PAIR[0], PAIR[1] | {"reasoning_content": "It is in Kenya."}]}
    with pytest.raises(InputError, match=r"row 1: the tokenizer's chat template does not show reasoning_content"):
        load([thought], tokenizer, tmp_path)
    shows = tiny_tokenizer()
    shows.chat_template = CHATML.replace("m.content", "(m.reasoning_content or '') + m.content")
    assert "[[It is in Kenya.Nairobi" in marked_row(shows, load([thought], shows, tmp_path)[0], 1000)


def test_plain_has_a_prompt_and_an_answer_only(tmp_path, tokenizer):
    assert len(load([ROWS["messages"]], tokenizer, tmp_path, Encoding("plain", 256, 2)))
    with pytest.raises(
        InputError, match=r"row 1: is a conversation \(system, user, assistant, user, assistant\), but prompt_"
    ):
        load([LONG], tokenizer, tmp_path, Encoding("plain", 256, 2))


@pytest.mark.parametrize("page", ["README.md", "docs/DATA.md"])
def test_the_rows_of_the_pages_are_read(page):
    blocks = re.findall(r"```json\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    rows = [json.loads(line) for block in blocks for line in block.splitlines()]
    assert len(rows) > 1
    assert [problem for row in rows if (problem := row_problem(row, 2))] == []


def test_every_format_has_a_row_here():
    assert {FORMATS[name] for name in ROWS} == set(FORMATS.values())
    assert all(row_problem(row, 2) is None for row in ROWS.values())
