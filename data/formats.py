"""The shapes of rows that users have, and the conversation that each is.

A row of two texts, a prompt and an answer, is a conversation of two turns, so that everything after this file knows one
shape. docs/DATA.md shows a row of each format.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from data.errors import InputError, first_line
from data.files import Unreadable, is_unicode, shown

Turn = dict[str, Any]

ROLES = {
    "system": "system", "developer": "system", "user": "user", "human": "user", "assistant": "assistant",
    "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant", "model": "assistant",
    "tool": "tool", "function": "tool", "function_response": "tool", "observation": "tool",
    "function_call": "tool call", "tool_call": "tool call",
}  # fmt: skip
# What a turn may have besides its role and its content, as chat templates know it.
OTHER_KEYS = ("name", "tool_call_id", "reasoning_content")


@dataclass(frozen=True)
class Conversation:
    """Turns, as chat templates take them.

    Args:
        messages: dicts with `role` (system, user, assistant or tool), `content` (a string) and what else the turn has.
        tools: JSON schemas of the functions that the assistant may call.
    """

    messages: list[Turn]
    tools: list[dict] | None = None

    @property
    def answers(self) -> list[int]:
        """Indices of the assistant's turns that are to be learnt: one that begins the conversation answers nothing."""
        turns = enumerate(self.messages)
        return [index for index, turn in turns if index and turn["role"] == "assistant" and turn.get("weight") != 0]

    def until(self, turn: int) -> "Conversation":
        """The turns before one."""
        return replace(self, messages=self.messages[:turn])


class Format(NamedTuple):
    """Names of columns.

    Args:
        question: the prompt; of a conversation, its turns.
        answer: the answer; None for a conversation.
        context: text that follows the prompt, which may be missing.
    """

    question: str
    answer: str | None = None
    context: str | None = None

    @property
    def needed(self) -> list[str]:
        return [name for name in (self.question, self.answer) if name]

    @property
    def columns(self) -> list[str]:
        """All that a row of this format may have."""
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
    """The format of a row: the declared one, or the only one whose columns it has.

    If it has those of none, it is the nearest.

    Args:
        answered: the row needs an answer, so that its column counts.

    Raises:
        InputError: it has those of several.
    """
    if declared:
        return FORMATS[declared]
    asked = {name: form for name, form in FORMATS.items() if form.question in row and name != "alpaca"}
    found = {name: form for name, form in asked.items() if all(column in row for column in form.needed)}
    if len(found) > 1:
        found = {name: form for name, form in found.items() if not any(is_empty(row[column]) for column in form.needed)}
    if len(found) > 1 and answered:
        names = " and ".join(f"{name} ({', '.join(form.needed)})" for name, form in found.items())
        raise InputError(f"has the columns of several formats, {names}: name the format, or take the others out")
    begun = sorted(asked.values(), key=lambda form: form.context not in row)
    return next(iter([*found.values(), *begun, FORMATS["instruction"]]))


def to_conversation(row: Mapping[str, Any], form: Format, answered: bool = True) -> Conversation:
    """The conversation that a row is, up to its last answer.

    Args:
        answered: the row needs an answer; otherwise it is a prompt, and the conversation is what comes before the
            answer, if there is one.

    Raises:
        InputError: something about the row is wrong; the message begins with a verb, as the row's predicate.
    """
    if missing := [column for column in form.needed if column not in row and (answered or column != form.answer)]:
        others = "" if form.question in row else f" (other formats have {_QUESTIONS})"
        raise InputError(f"has no {missing[0]!r}{others}; its fields are {', '.join(map(repr, row)) or 'none'}")
    turns = _pair(row, form, answered) if form.answer else _turns(row[form.question], form.question)
    system = row.get("system")
    if not is_empty(system):
        turns.insert(0, {"role": "system", "content": _text("'system'", system)})
    tools = None if form.answer else _tools(row.get("tools"))
    _check_tools(turns, tools)
    conversation = Conversation(turns, tools)
    if answered:
        if not conversation.answers:
            raise InputError(f"has no answer of the assistant in {form.question!r}: there is nothing to learn from")
        return conversation.until(conversation.answers[-1] + 1)
    prompt = conversation.until(len(turns) - (turns[-1]["role"] == "assistant"))
    if not prompt.messages:
        raise InputError("has an answer, but no prompt")
    return prompt


def is_empty(value: object) -> bool:
    return value is None or (value.strip() if isinstance(value, str) else value) in ("", [], {})


def _pair(row: Mapping[str, Any], form: Format, answered: bool) -> list[Turn]:
    """A prompt and, if needed, its answer. Either may be a list of turns, as conversations are split in two."""
    assert form.answer
    question, answer = row[form.question], row.get(form.answer) if answered else None
    if isinstance(question, list) or isinstance(answer, list):
        turns = _turns(question, form.question) if isinstance(question, list) else [_turn("user", question)]
        return turns + (_turns(answer, form.answer) if answered else [])
    prompt = _text(repr(form.question), question)
    context = row.get(form.context) if form.context else None
    if context is not None and _text(repr(form.context), context):
        prompt = f"{prompt}\n{context}"
    turns = [_turn("user", prompt)]
    if answered:
        turns.append(_turn("assistant", _text(repr(form.answer), answer)))
        if not turns[-1]["content"].strip():
            raise InputError(f"{form.answer!r} is empty: there is nothing to learn from")
    return turns


def _turn(role: str, content: str) -> Turn:
    return {"role": role, "content": content}


def _turns(value: object, column: str) -> list[Turn]:
    if not isinstance(value, list):
        raise InputError(f"{column!r} is {shown(value)}, but has to be a list of turns")
    if not value:
        raise InputError(f"{column!r} is empty: a conversation has at least one turn")
    return [_read_turn(turn, f"{column}[{index}]") for index, turn in enumerate(value)]


def _read_turn(turn: object, place: str) -> Turn:
    """A turn in either spelling, `role` and `content` or `from` and `value`."""
    if not isinstance(turn, dict):
        raise InputError(f"{place} is {shown(turn)}, but has to be an object with a role and a content")
    if not is_empty(turn.get("function_call")):
        raise InputError(f"{place} has a 'function_call', which is not read: write it as 'tool_calls'")
    names = ("from", "value") if "from" in turn and "role" not in turn else ("role", "content")
    needed = names[:1] if turn.get("tool_calls") else names
    if missing := [name for name in needed if name not in turn]:
        raise InputError(f"{place} has no {missing[0]!r}; its fields are {', '.join(map(repr, turn)) or 'none'}")
    role, content = turn[names[0]], turn.get(names[1])
    if not isinstance(role, str) or role not in ROLES:
        raise InputError(f"{place} has the {names[0]} {shown(role)}; known are {', '.join(ROLES)}")
    read: Turn = {"role": ROLES[role], "content": _content(place, content, optional=bool(turn.get("tool_calls")))}
    if read["role"] == "tool call":
        return {"role": "assistant", "content": "", "tool_calls": [_call(place, _json(place, read["content"]))]}
    for key in OTHER_KEYS:
        if not is_empty(turn.get(key)):
            read[key] = _text(f"{place}.{key}", turn[key])
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
    """A turn's text, which may be in parts."""
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
        raise InputError(f"{place} has the weight {shown(weight)}, but it has to be 1, or 0 for an answer not to learn")
    return int(weight)


def _call(place: str, call: object) -> dict:
    """A call of a tool: `function` with `name` and `arguments`, or these alone. Arguments may be written as JSON."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise InputError(f"{place} is {shown(call)}, but has to be a function with a name and arguments")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        arguments = _json(f"{place}: the arguments", arguments)
    elif isinstance(arguments, dict):  # of Parquet, whose rows all have the same names
        arguments = {name: value for name, value in arguments.items() if value is not None}
    read = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    return {"id": call["id"], **read} if isinstance(call, dict) and isinstance(call.get("id"), str) else read


def _tools(tools: object) -> list[dict] | None:
    if is_empty(tools):
        return None
    tools = _json("'tools'", tools) if isinstance(tools, str) else tools
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise InputError(f"'tools' is {shown(tools)}, but has to be a list of functions' JSON schemas")
    return tools or None


def _check_tools(turns: list[Turn], tools: list[dict] | None) -> None:
    of_tools = [index for index, turn in enumerate(turns) if turn.get("tool_calls") or turn["role"] == "tool"]
    if of_tools and not tools:
        raise InputError(f"calls a tool (turn {of_tools[0]}), but has no 'tools' that says which there are")
    try:
        json.dumps([tools, *(turn.get("tool_calls") for turn in turns)], ensure_ascii=False).encode()
    except (TypeError, ValueError, RecursionError) as error:  # dates of Parquet, half a surrogate pair, endless nesting
        raise InputError(f"has a tool, or a call of one, that is not JSON ({first_line(error)})") from None


def _json(place: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{place}: not JSON ({error}): {shown(text)}") from None


def _text(name: str, value: object) -> str:
    if isinstance(value, Unreadable):
        raise InputError(f"{name} cannot be read: {value.reason}")
    if not isinstance(value, str):
        raise InputError(f"{name} is {shown(value)}, but has to be a string")
    if not is_unicode(value):
        raise InputError(f"{name} holds half of a surrogate pair, which is not a character: {shown(value)}")
    return value
