"""Formats of rows, and the conversion of each into a conversation.

A prompt with its answer is a conversation of two turns, so all later code handles conversations only. docs/DATA.md
shows a row of each format.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from data.errors import InputError
from data.files import Unreadable, is_unicode, shown

Turn = dict[str, Any]

ROLES = {
    "system": "system", "developer": "system", "user": "user", "human": "user", "assistant": "assistant",
    "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant", "model": "assistant",
    "tool": "tool", "function": "tool", "function_response": "tool", "observation": "tool",
    "function_call": "tool call", "tool_call": "tool call",
}  # fmt: skip
# Keys of a turn besides role and content, as chat templates name them.
OTHER_KEYS = ("name", "tool_call_id", "reasoning_content")


@dataclass(frozen=True)
class Conversation:
    """Turns in the form that chat templates expect.

    Args:
        messages: dicts with `role` (system, user, assistant or tool), `content` (a string) and perhaps `OTHER_KEYS`,
            `tool_calls` and `weight`.
        tools: JSON schemas of the functions that the assistant may call.
    """

    messages: list[Turn]
    tools: list[dict] | None = None

    @property
    def answers(self) -> list[int]:
        """Indices of the assistant turns to train on. One that begins the conversation answers nothing."""
        turns = enumerate(self.messages)
        return [index for index, turn in turns if index and turn["role"] == "assistant" and turn.get("weight") != 0]

    def until(self, turn: int) -> "Conversation":
        """The conversation before a turn."""
        return replace(self, messages=self.messages[:turn])


class Format(NamedTuple):
    """Column names of a format.

    Args:
        question: the prompt, or the turns of a conversation.
        answer: the answer; None for a conversation.
        context: optional text that follows the prompt.
    """

    question: str
    answer: str | None = None
    context: str | None = None

    @property
    def needed(self) -> list[str]:
        return [name for name in (self.question, self.answer) if name]

    @property
    def columns(self) -> list[str]:
        """All columns of the format, optional ones included."""
        others = ("system",) if self.answer else ("system", "tools")
        return [name for name in (*self, *others) if name]


FORMATS = {
    "instruction": Format("instruction", "output", "input"),
    "dolly": Format("instruction", "response", "context"),
    "prompt_completion": Format("prompt", "completion"),
    "prompt_response": Format("prompt", "response"),
    "messages": Format("messages"),
    "sharegpt": Format("conversations"),
}
FORMATS["alpaca"] = FORMATS["instruction"]
_QUESTIONS = ", ".join(dict.fromkeys(repr(form.question) for form in FORMATS.values()))


def find_format(row: Mapping[str, Any], declared: str | None = None, answered: bool = True) -> Format:
    """The format of a row: the declared one, else the one whose columns the row has, else the closest.

    Args:
        answered: the row needs an answer.

    Raises:
        InputError: the row has the columns of several formats.
    """
    if declared:
        return FORMATS[declared]
    asked = {name: form for name, form in FORMATS.items() if form.question in row and name != "alpaca"}
    found = {name: form for name, form in asked.items() if all(column in row for column in form.needed)}
    if len(found) > 1:
        found = {name: form for name, form in found.items() if not any(is_empty(row[column]) for column in form.needed)}
    if len(found) > 1 and answered:
        names = " and ".join(f"{name} ({', '.join(form.needed)})" for name, form in found.items())
        raise InputError(f"has the columns of several formats, {names}: name one in a mix.yaml, or remove columns")
    begun = sorted(asked.values(), key=lambda form: form.context not in row)
    return next(iter([*found.values(), *begun, FORMATS["instruction"]]))


def to_conversation(row: Mapping[str, Any], form: Format, answered: bool = True) -> Conversation:
    """Convert a row into a conversation that ends with its last answer.

    Args:
        answered: the row needs an answer. If False, the conversation ends before the last answer, if there is one.

    Raises:
        InputError: the row is invalid. The message completes a sentence that begins with the row.
    """
    if missing := [column for column in form.needed if column not in row and (answered or column != form.answer)]:
        others = "" if form.question in row else f" (formats begin with {_QUESTIONS}; docs/DATA.md: other names)"
        raise InputError(f"has no {missing[0]!r}{others}; its fields are {', '.join(map(repr, row)) or 'none'}")
    turns = _pair(row, form, answered) if form.answer else _turns(row[form.question], form.question)
    system = row.get("system")
    if not is_empty(system):
        if turns[0]["role"] == "system":
            raise InputError("has both a 'system' and a system turn: remove one of them")
        turns.insert(0, {"role": "system", "content": _text("'system'", system)})
    tools = None if form.answer else _tools(row.get("tools"))
    _check_tools(turns, tools)
    conversation = Conversation(turns, tools)
    if answered:
        if not conversation.answers:
            raise InputError(f"has no answer to train on in {form.question!r}")
        return conversation.until(conversation.answers[-1] + 1)
    prompt = conversation.until(len(turns) - (turns[-1]["role"] == "assistant"))
    if not prompt.messages:
        raise InputError("has an answer, but no prompt")
    return prompt


def is_empty(value: object) -> bool:
    return value is None or (value.strip() if isinstance(value, str) else value) in ("", [], {})


def _pair(row: Mapping[str, Any], form: Format, answered: bool) -> list[Turn]:
    """The turns of a prompt, which are not learnt, and, if needed, its answer. Either may be a list of turns."""
    assert form.answer
    question, answer = row[form.question], row.get(form.answer)
    context = _text(repr(form.context), row[form.context]) if form.context and row.get(form.context) is not None else ""
    if isinstance(question, list):
        turns = _turns(question, form.question)
        turns = [turn | {"weight": 0} if turn["role"] == "assistant" else turn for turn in turns]
    else:
        prompt = _text(repr(form.question), question)
        turns = [{"role": "user", "content": f"{prompt}\n{context}" if context else prompt}]
    if not answered:
        return turns
    if isinstance(answer, list):
        return turns + _turns(answer, form.answer)
    if not _text(repr(form.answer), answer).strip():
        raise InputError(f"{form.answer!r} is empty: there is nothing to learn from")
    return [*turns, {"role": "assistant", "content": answer}]


def _turns(value: object, column: str) -> list[Turn]:
    if isinstance(value, str):  # of a table, whose cells are text
        value = _json(repr(column), value)
    if not isinstance(value, list):
        raise InputError(f"{column!r} is {shown(value)}, but has to be a list of turns")
    if not value:
        raise InputError(f"{column!r} is empty: a conversation has at least one turn")
    return [_read_turn(turn, f"{column}[{index}]") for index, turn in enumerate(value)]


def _read_turn(turn: object, place: str) -> Turn:
    """Read a turn with `role` and `content`, or with `from` and `value`."""
    if not isinstance(turn, dict):
        raise InputError(f"{place} is {shown(turn)}, but has to be an object with role and content")
    names = ("from", "value") if "from" in turn and "role" not in turn else ("role", "content")
    needed = names[:1] if turn.get("tool_calls") else names
    if missing := [name for name in needed if name not in turn]:
        raise InputError(f"{place} has no {missing[0]!r}; its fields are {', '.join(map(repr, turn)) or 'none'}")
    role, content = turn[names[0]], turn.get(names[1])
    if not isinstance(role, str) or role not in ROLES:
        raise InputError(f"{place}.{names[0]} is {shown(role)}, but has to be one of {', '.join(ROLES)}")
    read: Turn = {"role": ROLES[role], "content": _content(place, content, optional=bool(turn.get("tool_calls")))}
    if read["role"] == "tool call":
        return {"role": "assistant", "content": "", "tool_calls": [_call(place, _json(place, read["content"]))]}
    for key in OTHER_KEYS:
        if not is_empty(turn.get(key)):
            read[key] = _text(f"{place}.{key}", turn[key])
    if not is_empty(turn.get("function_call")):
        raise InputError(f"{place} has a 'function_call', which is not read: write it as 'tool_calls'")
    if turn.get("weight") is not None:
        read["weight"] = _weight(place, turn["weight"])
    if not is_empty(calls := turn.get("tool_calls")):
        if not isinstance(calls, list):
            raise InputError(f"{place}.tool_calls is {shown(calls)}, but has to be a list")
        read["tool_calls"] = [_call(f"{place}.tool_calls[{index}]", call) for index, call in enumerate(calls)]
    if read["role"] == "assistant" and not read["content"].strip() and "tool_calls" not in read:
        raise InputError(f"{place} is an empty answer: there is nothing to learn from")
    return read


def _content(place: str, content: object, optional: bool) -> str:
    """The text of a turn. Lists of parts are joined."""
    if content is None and optional:
        return ""
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, dict) else part for part in content]
        if not all(isinstance(part, str) for part in parts):
            raise InputError(f"{place} has a part that is not text: {shown(content)}; only text is supported")
        content = "".join(map(str, parts))
    return _text(f"the content of {place}", content)


def _weight(place: str, weight: object) -> int:
    if weight not in (0, 1) or isinstance(weight, bool):
        raise InputError(f"{place}.weight is {shown(weight)}, but has to be 1, or 0 for an answer not to train on")
    return int(weight)


def _call(place: str, call: object) -> dict:
    """A tool call: `function` with `name` and `arguments`, or these two alone. `arguments` may be a JSON string."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise InputError(f"{place} is {shown(call)}, but has to be a function with a name and arguments")
    arguments = _json(f"{place}.arguments", function.get("arguments", {}))
    name = _text(f"{place}.name", function["name"])
    read = {"type": "function", "function": {"name": name, "arguments": arguments}}
    if isinstance(call, dict) and isinstance(call.get("id"), str):
        return {"id": _text(f"{place}.id", call["id"]), **read}
    return read


def _tools(tools: object) -> list[dict] | None:
    if is_empty(tools):
        return None
    tools = _json("'tools'", tools)
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise InputError(f"'tools' is {shown(tools)}, but has to be a list of JSON schemas of functions")
    return tools or None


def _check_tools(turns: list[Turn], tools: list[dict] | None) -> None:
    of_tools = [index for index, turn in enumerate(turns) if turn.get("tool_calls") or turn["role"] == "tool"]
    if of_tools and not tools:
        raise InputError(f"uses a tool (turn {of_tools[0]}), but has no 'tools' that describes it")


def _without_nulls(value: Any) -> Any:
    """A value without fields that are null: of Parquet and of the hub, all objects have the same names."""
    if isinstance(value, list):
        return [_without_nulls(each) for each in value]
    if isinstance(value, dict):
        return {name: _without_nulls(each) for name, each in value.items() if each is not None}
    return value


def _json(place: str, value: object) -> Any:
    """A value of JSON, which may be written as text."""
    try:
        read = json.loads(value) if isinstance(value, str) else _without_nulls(value)
        text = json.dumps(read, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"{place}: not JSON ({error}): {shown(value)}") from None
    if not is_unicode(text):
        raise InputError(f"{place} holds half of a surrogate pair, which is not a character: {shown(value)}")
    return read


def _text(name: str, value: object) -> str:
    if isinstance(value, Unreadable):
        raise InputError(f"{name} cannot be read: {value.reason}")
    if not isinstance(value, str):
        raise InputError(f"{name} is {shown(value)}, but has to be a string")
    if not is_unicode(value):
        raise InputError(f"{name} holds half of a surrogate pair, which is not a character: {shown(value)}")
    return value
