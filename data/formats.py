"""Placeholder until main has the formats."""

from typing import NamedTuple


class Format(NamedTuple):
    question: str
    answer: str | None = None
    context: str | None = None

    @property
    def columns(self) -> list[str]:
        others = ("system",) if self.answer else ("system", "tools")
        return [name for name in (*self, *others) if name]


FORMATS = {
    "instruction": Format("instruction", "output", "input"),
    "prompt_completion": Format("prompt", "completion"),
    "messages": Format("messages"),
}
