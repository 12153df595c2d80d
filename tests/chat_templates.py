"""Chat templates in the shapes of published ones, and what they make of the same conversations.

The templates are our own, written from what is publicly known of each family: its tokens, line breaks and habits. Each
has, for every conversation, the text that it renders with thinking off, with the supervised parts in [[ ]]: for every
turn of the assistant, all that follows the prompt for it, up to and including the token that ends it.
"""

from dataclasses import dataclass

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

REFUSED = "refused"

CLOCK = {
    "type": "function",
    "function": {
        "name": "clock",
        "description": "Tell the time",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


def turns(text: str) -> list[dict]:
    """Messages from lines `ROLE: CONTENT`, in which \\n is a line break."""
    pairs = (line.split(": ", 1) for line in text.splitlines())
    return [{"role": role, "content": content.replace("\\n", "\n")} for role, content in pairs]


CONVERSATIONS = {
    "single": turns("user: Name a colour.\nassistant: Blue."),
    "system": turns("system: Be brief.\nuser: Name a colour.\nassistant: Blue.\nuser: And another?\nassistant: Red."),
    "spaces": turns("user:   Name a colour. \\n\nassistant: \\n Blue. \\n\nuser: And another?\nassistant:  Red. "),
    "echo": turns("user: Blue.\nassistant: Blue.\nuser: assistant\nassistant: assistant"),
    "thinking": turns(
        "user: Name a colour.\nassistant: <think>\\nWarm?\\n</think>\\n\\nRed.\n"
        "user: And another?\nassistant: <think>\\nCold?\\n</think>\\n\\nBlue."
    ),
    "reasoning": [
        {"role": "user", "content": "Name a colour."},
        {"role": "assistant", "reasoning_content": "Warm?", "content": "Red."},
        {"role": "user", "content": "And another?"},
        {"role": "assistant", "reasoning_content": "Cold?", "content": "Blue."},
    ],
    "twice": turns("user: Name a colour.\nassistant: Blue.\nassistant: Or red."),
    "tools": [
        {"role": "user", "content": "What time is it in Paris?"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                {
                    "id": "call00001",
                    "type": "function",
                    "function": {"name": "clock", "arguments": {"city": "Paris"}},
                }
            ],
        },
        {"role": "tool", "tool_call_id": "call00001", "name": "clock", "content": "10:00"},
        {"role": "assistant", "content": "It is ten."},
    ],
}
# Those that are given tools.
TOOLS = {"tools": [CLOCK]}
# Of tokenizers.
TEXTS = 4 * [line for messages in CONVERSATIONS.values() for turn in messages for line in turn["content"].split("\n")]


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template, the special tokens that it needs, and what it renders.

    Args:
        marked: conversation -> rendered text with the supervised parts in [[ ]], or `REFUSED`.
        others: special tokens beside BOS and EOS.
    """

    source: str
    marked: dict[str, str]
    eos: str
    bos: str | None = None
    others: tuple[str, ...] = ()


# A system turn only if one is given; contents are trimmed; tools are written into the first user turn and a call is
# bare JSON, as of Llama 3.1.
LLAMA_3 = ChatTemplate(
    source="""
{% macro header(role) %}{{ '<|start_header_id|>' ~ role ~ '<|end_header_id|>\\n\\n' }}{% endmacro %}
{% set seen = namespace(user=false) %}
{{- bos_token -}}
{% for turn in messages %}
  {% if turn.tool_calls %}
    {% set function = turn.tool_calls[0].function %}
    {{- header('assistant') ~ '{"name": "' ~ function.name ~ '", "parameters": ' -}}
    {{- function.arguments | tojson ~ '}' -}}
  {% elif turn.role == 'tool' %}
    {{- header('ipython') ~ turn.content | tojson -}}
  {% elif turn.role == 'user' and tools and not seen.user %}
    {{- header('user') ~ 'Functions you may call:\\n\\n' -}}
    {% for tool in tools %}
      {{- tool | tojson ~ '\\n\\n' -}}
    {% endfor %}
    {{- turn.content | trim -}}
    {% set seen.user = true %}
  {% else %}
    {{- header(turn.role) ~ turn.content | trim -}}
  {% endif %}
  {{- '<|eot_id|>' -}}
{% endfor %}
{% if add_generation_prompt %}
  {{- header('assistant') -}}
{% endif %}
""",
    bos="<|begin_of_text|>",
    eos="<|eot_id|>",
    others=("<|start_header_id|>", "<|end_header_id|>"),
    marked={
        "single": "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nName a colour.<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n[[Blue.<|eot_id|>]]",
        "system": "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nName a colour.<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n[[Blue.<|eot_id|>]]"
        "<|start_header_id|>user<|end_header_id|>\n\nAnd another?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n[[Red.<|eot_id|>]]",
        "spaces": "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nName a colour.<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n[[Blue.<|eot_id|>]]"
        "<|start_header_id|>user<|end_header_id|>\n\nAnd another?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n[[Red.<|eot_id|>]]",
        "echo": "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nBlue.<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n[[Blue.<|eot_id|>]]"
        "<|start_header_id|>user<|end_header_id|>\n\nassistant<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n[[assistant<|eot_id|>]]",
        "thinking": "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nName a colour.<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n[[<think>\nWarm?\n</think>\n\nRed.<|eot_id|>]]"
        "<|start_header_id|>user<|end_header_id|>\n\nAnd another?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n[[<think>\nCold?\n</think>\n\nBlue.<|eot_id|>]]",
        "twice": "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nName a colour.<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n[[Blue.<|eot_id|>]]"
        "<|start_header_id|>assistant<|end_header_id|>\n\n[[Or red.<|eot_id|>]]",
        "tools": "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nFunctions you may call:\n\n"
        '{"type": "function", "function": {"name": "clock", "description": "Tell the time", "parameters": '
        '{"type": "object", "properties": {"city": {"type": "string"}}}}}\n\n'
        "What time is it in Paris?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
        '[[{"name": "clock", "parameters": {"city": "Paris"}}<|eot_id|>]]'
        '<|start_header_id|>ipython<|end_header_id|>\n\n"10:00"<|eot_id|>'
        "<|start_header_id|>assistant<|end_header_id|>\n\n[[It is ten.<|eot_id|>]]",
    },
)

# ChatML with a system turn in any case, in which the tools stand; a tool's result is a user turn.
QWEN_2_5 = ChatTemplate(
    source="""
{% set given = messages[0].role == 'system' %}
{{- '<|im_start|>system\\n' ~ (messages[0].content if given else 'You are Qwen.') -}}
{% if tools %}
  {{- '\\n\\n# Tools\\n\\n<tools>' -}}
  {% for tool in tools %}
    {{- '\\n' ~ tool | tojson -}}
  {% endfor %}
  {{- '\\n</tools>' -}}
{% endif %}
{{- '<|im_end|>\\n' -}}
{% for turn in (messages[1:] if given else messages) %}
  {% if turn.role == 'tool' %}
    {% if loop.previtem is not defined or loop.previtem.role != 'tool' %}
      {{- '<|im_start|>user' -}}
    {% endif %}
    {{- '\\n<tool_response>\\n' ~ turn.content ~ '\\n</tool_response>' -}}
    {% if loop.last or loop.nextitem.role != 'tool' %}
      {{- '<|im_end|>\\n' -}}
    {% endif %}
  {% elif turn.tool_calls %}
    {{- '<|im_start|>assistant' ~ ('\\n' ~ turn.content if turn.content else '') -}}
    {% for call in turn.tool_calls %}
      {{- '\\n<tool_call>\\n{"name": "' ~ call.function.name ~ '", "arguments": ' -}}
      {{- call.function.arguments | tojson ~ '}\\n</tool_call>' -}}
    {% endfor %}
    {{- '<|im_end|>\\n' -}}
  {% else %}
    {{- '<|im_start|>' ~ turn.role ~ '\\n' ~ turn.content ~ '<|im_end|>\\n' -}}
  {% endif %}
{% endfor %}
{% if add_generation_prompt %}
  {{- '<|im_start|>assistant\\n' -}}
{% endif %}
""",
    eos="<|im_end|>",
    others=("<|im_start|>",),
    marked={
        "single": "<|im_start|>system\nYou are Qwen.<|im_end|>\n<|im_start|>user\nName a colour.<|im_end|>\n"
        "<|im_start|>assistant\n[[Blue.<|im_end|>]]\n",
        "system": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nName a colour.<|im_end|>\n"
        "<|im_start|>assistant\n[[Blue.<|im_end|>]]\n<|im_start|>user\nAnd another?<|im_end|>\n"
        "<|im_start|>assistant\n[[Red.<|im_end|>]]\n",
        "spaces": "<|im_start|>system\nYou are Qwen.<|im_end|>\n<|im_start|>user\n  Name a colour. \n<|im_end|>\n"
        "<|im_start|>assistant\n[[\n Blue. \n<|im_end|>]]\n<|im_start|>user\nAnd another?<|im_end|>\n"
        "<|im_start|>assistant\n[[ Red. <|im_end|>]]\n",
        "echo": "<|im_start|>system\nYou are Qwen.<|im_end|>\n<|im_start|>user\nBlue.<|im_end|>\n"
        "<|im_start|>assistant\n[[Blue.<|im_end|>]]\n<|im_start|>user\nassistant<|im_end|>\n"
        "<|im_start|>assistant\n[[assistant<|im_end|>]]\n",
        "thinking": "<|im_start|>system\nYou are Qwen.<|im_end|>\n<|im_start|>user\nName a colour.<|im_end|>\n"
        "<|im_start|>assistant\n[[<think>\nWarm?\n</think>\n\nRed.<|im_end|>]]\n"
        "<|im_start|>user\nAnd another?<|im_end|>\n"
        "<|im_start|>assistant\n[[<think>\nCold?\n</think>\n\nBlue.<|im_end|>]]\n",
        "twice": "<|im_start|>system\nYou are Qwen.<|im_end|>\n<|im_start|>user\nName a colour.<|im_end|>\n"
        "<|im_start|>assistant\n[[Blue.<|im_end|>]]\n<|im_start|>assistant\n[[Or red.<|im_end|>]]\n",
        "tools": "<|im_start|>system\nYou are Qwen.\n\n# Tools\n\n<tools>\n"
        '{"type": "function", "function": {"name": "clock", "description": "Tell the time", "parameters": '
        '{"type": "object", "properties": {"city": {"type": "string"}}}}}\n</tools><|im_end|>\n'
        "<|im_start|>user\nWhat time is it in Paris?<|im_end|>\n"
        '<|im_start|>assistant\n[[<tool_call>\n{"name": "clock", "arguments": {"city": "Paris"}}\n</tool_call>'
        "<|im_end|>]]\n"
        "<|im_start|>user\n<tool_response>\n10:00\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n[[It is ten.<|im_end|>]]\n",
    },
)

# Thoughts are kept only after the last question of the user; there the last turn has a block in any case. With thinking
# off the prompt ends with an empty block.
QWEN_3 = ChatTemplate(
    source="""
{% set last = namespace(query=-1) %}
{% for turn in messages %}
  {% if turn.role == 'user' %}
    {% set last.query = loop.index0 %}
  {% endif %}
{% endfor %}
{% if tools or messages[0].role == 'system' %}
  {{- '<|im_start|>system\\n' -}}
  {{- messages[0].content if messages[0].role == 'system' else '' -}}
  {% if tools %}
    {{- '\\n\\n' if messages[0].role == 'system' else '' -}}
    {{- '# Tools\\n\\n<tools>' -}}
    {% for tool in tools %}
      {{- '\\n' ~ tool | tojson -}}
    {% endfor %}
    {{- '\\n</tools>' -}}
  {% endif %}
  {{- '<|im_end|>\\n' -}}
{% endif %}
{% for turn in messages %}
  {% if turn.role == 'user' %}
    {{- '<|im_start|>user\\n' ~ turn.content ~ '<|im_end|>\\n' -}}
  {% elif turn.role == 'tool' %}
    {{- '<|im_start|>user' if loop.previtem.role != 'tool' else '' -}}
    {{- '\\n<tool_response>\\n' ~ turn.content ~ '\\n</tool_response>' -}}
    {{- '<|im_end|>\\n' if loop.last or loop.nextitem.role != 'tool' else '' -}}
  {% elif turn.role == 'assistant' %}
    {% set parts = turn.content.split('</think>') %}
    {% set content = parts[-1].lstrip('\\n') if parts | length > 1 else turn.content %}
    {% set thought = parts[0].split('<think>')[-1].strip('\\n') if parts | length > 1 else turn.reasoning_content %}
    {{- '<|im_start|>assistant\\n' -}}
    {% if loop.index0 > last.query and (loop.last or thought) %}
      {{- '<think>\\n' ~ thought ~ '\\n</think>\\n\\n' ~ content.lstrip('\\n') -}}
    {% else %}
      {{- content -}}
    {% endif %}
    {% for call in turn.tool_calls or [] %}
      {{- '\\n' if content or not loop.first else '' -}}
      {{- '<tool_call>\\n{"name": "' ~ call.function.name ~ '", "arguments": ' -}}
      {{- call.function.arguments | tojson ~ '}\\n</tool_call>' -}}
    {% endfor %}
    {{- '<|im_end|>\\n' -}}
  {% endif %}
{% endfor %}
{% if add_generation_prompt %}
  {{- '<|im_start|>assistant\\n' -}}
  {% if enable_thinking is defined and not enable_thinking %}
    {{- '<think>\\n\\n</think>\\n\\n' -}}
  {% endif %}
{% endif %}
""",
    eos="<|im_end|>",
    others=("<|im_start|>", "<|endoftext|>"),
    marked={
        "single": "<|im_start|>user\nName a colour.<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\n[[Blue.<|im_end|>]]\n",
        "system": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nName a colour.<|im_end|>\n"
        "<|im_start|>assistant\n[[Blue.<|im_end|>]]\n<|im_start|>user\nAnd another?<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\n[[Red.<|im_end|>]]\n",
        "spaces": "<|im_start|>user\n  Name a colour. \n<|im_end|>\n"
        "<|im_start|>assistant\n[[\n Blue. \n<|im_end|>]]\n<|im_start|>user\nAnd another?<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\n[[ Red. <|im_end|>]]\n",
        "echo": "<|im_start|>user\nBlue.<|im_end|>\n"
        "<|im_start|>assistant\n[[Blue.<|im_end|>]]\n<|im_start|>user\nassistant<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\n[[assistant<|im_end|>]]\n",
        "thinking": "<|im_start|>user\nName a colour.<|im_end|>\n<|im_start|>assistant\n[[Red.<|im_end|>]]\n"
        "<|im_start|>user\nAnd another?<|im_end|>\n"
        "<|im_start|>assistant\n[[<think>\nCold?\n</think>\n\nBlue.<|im_end|>]]\n",
        "reasoning": "<|im_start|>user\nName a colour.<|im_end|>\n<|im_start|>assistant\n[[Red.<|im_end|>]]\n"
        "<|im_start|>user\nAnd another?<|im_end|>\n"
        "<|im_start|>assistant\n[[<think>\nCold?\n</think>\n\nBlue.<|im_end|>]]\n",
        "twice": "<|im_start|>user\nName a colour.<|im_end|>\n<|im_start|>assistant\n[[Blue.<|im_end|>]]\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\n[[Or red.<|im_end|>]]\n",
        "tools": "<|im_start|>system\n# Tools\n\n<tools>\n"
        '{"type": "function", "function": {"name": "clock", "description": "Tell the time", "parameters": '
        '{"type": "object", "properties": {"city": {"type": "string"}}}}}\n</tools><|im_end|>\n'
        "<|im_start|>user\nWhat time is it in Paris?<|im_end|>\n"
        '<|im_start|>assistant\n[[<tool_call>\n{"name": "clock", "arguments": {"city": "Paris"}}\n</tool_call>'
        "<|im_end|>]]\n"
        "<|im_start|>user\n<tool_response>\n10:00\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\n[[It is ten.<|im_end|>]]\n",
    },
)

# The system text and the tools move to the last user turn, so that the text of earlier turns depends on later ones.
# Nothing is added for generation: an answer begins with a space.
MISTRAL = ChatTemplate(
    source="""
{% set system = messages[0].content ~ '\\n\\n' if messages[0].role == 'system' else '' %}
{% set turns = messages[1:] if system else messages %}
{% set last = namespace(user=-1, count=0) %}
{% for turn in turns %}
  {% if turn.role == 'user' %}
    {% set last.user = loop.index0 %}
  {% endif %}
  {% if turn.role in ('user', 'assistant') and not turn.tool_calls %}
    {% if (turn.role == 'user') != (last.count % 2 == 0) %}
      {{- raise_exception('roles must alternate user/assistant/user/assistant/...') -}}
    {% endif %}
    {% set last.count = last.count + 1 %}
  {% endif %}
{% endfor %}
{{- bos_token -}}
{% for turn in turns %}
  {% if turn.role == 'user' %}
    {% if loop.index0 == last.user and tools %}
      {{- '[AVAILABLE_TOOLS] ' ~ tools | tojson ~ '[/AVAILABLE_TOOLS]' -}}
    {% endif %}
    {{- '[INST] ' ~ (system if loop.index0 == last.user else '') ~ turn.content ~ '[/INST]' -}}
  {% elif turn.tool_calls %}
    {{- '[TOOL_CALLS] [' -}}
    {% for call in turn.tool_calls %}
      {{- dict(call.function, id=call.id) | tojson ~ ('' if loop.last else ', ') -}}
    {% endfor %}
    {{- ']' ~ eos_token -}}
  {% elif turn.role == 'tool' %}
    {{- '[TOOL_RESULTS] ' ~ {'content': turn.content, 'call_id': turn.tool_call_id} | tojson ~ '[/TOOL_RESULTS]' -}}
  {% elif turn.role == 'assistant' %}
    {{- ' ' ~ turn.content | trim ~ eos_token -}}
  {% endif %}
{% endfor %}
""",
    bos="<s>",
    eos="</s>",
    others=(
        "[INST]",
        "[/INST]",
        "[TOOL_CALLS]",
        "[AVAILABLE_TOOLS]",
        "[/AVAILABLE_TOOLS]",
        "[TOOL_RESULTS]",
        "[/TOOL_RESULTS]",
    ),
    marked={
        "single": "<s>[INST] Name a colour.[/INST][[ Blue.</s>]]",
        "system": "<s>[INST] Name a colour.[/INST][[ Blue.</s>]][INST] Be brief.\n\nAnd another?[/INST][[ Red.</s>]]",
        "spaces": "<s>[INST]   Name a colour. \n[/INST][[ Blue.</s>]][INST] And another?[/INST][[ Red.</s>]]",
        "echo": "<s>[INST] Blue.[/INST][[ Blue.</s>]][INST] assistant[/INST][[ assistant</s>]]",
        "thinking": "<s>[INST] Name a colour.[/INST][[ <think>\nWarm?\n</think>\n\nRed.</s>]]"
        "[INST] And another?[/INST][[ <think>\nCold?\n</think>\n\nBlue.</s>]]",
        "twice": REFUSED,
        "tools": "<s>[AVAILABLE_TOOLS] "
        '[{"type": "function", "function": {"name": "clock", "description": "Tell the time", "parameters": '
        '{"type": "object", "properties": {"city": {"type": "string"}}}}}][/AVAILABLE_TOOLS]'
        "[INST] What time is it in Paris?[/INST]"
        '[[[TOOL_CALLS] [{"name": "clock", "arguments": {"city": "Paris"}, "id": "call00001"}]</s>]]'
        '[TOOL_RESULTS] {"content": "10:00", "call_id": "call00001"}[/TOOL_RESULTS][[ It is ten.</s>]]',
    },
)

# The assistant is called model, and the token that ends its turn is not EOS.
GEMMA = ChatTemplate(
    source="""
{{- bos_token -}}
{% for turn in messages %}
  {% if turn.role == 'system' %}
    {{- raise_exception('System role not supported') -}}
  {% elif (turn.role == 'user') != (loop.index0 % 2 == 0) %}
    {{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') -}}
  {% endif %}
  {{- '<start_of_turn>' ~ ('model' if turn.role == 'assistant' else turn.role) ~ '\\n' -}}
  {{- turn.content | trim ~ '<end_of_turn>\\n' -}}
{% endfor %}
{% if add_generation_prompt %}
  {{- '<start_of_turn>model\\n' -}}
{% endif %}
""",
    bos="<bos>",
    eos="<eos>",
    others=("<start_of_turn>", "<end_of_turn>"),
    marked={
        "single": "<bos><start_of_turn>user\nName a colour.<end_of_turn>\n<start_of_turn>model\n"
        "[[Blue.<end_of_turn>]]\n",
        "system": REFUSED,
        "spaces": "<bos><start_of_turn>user\nName a colour.<end_of_turn>\n<start_of_turn>model\n"
        "[[Blue.<end_of_turn>]]\n<start_of_turn>user\nAnd another?<end_of_turn>\n<start_of_turn>model\n"
        "[[Red.<end_of_turn>]]\n",
        "echo": "<bos><start_of_turn>user\nBlue.<end_of_turn>\n<start_of_turn>model\n"
        "[[Blue.<end_of_turn>]]\n<start_of_turn>user\nassistant<end_of_turn>\n<start_of_turn>model\n"
        "[[assistant<end_of_turn>]]\n",
        "thinking": "<bos><start_of_turn>user\nName a colour.<end_of_turn>\n<start_of_turn>model\n"
        "[[<think>\nWarm?\n</think>\n\nRed.<end_of_turn>]]\n"
        "<start_of_turn>user\nAnd another?<end_of_turn>\n<start_of_turn>model\n"
        "[[<think>\nCold?\n</think>\n\nBlue.<end_of_turn>]]\n",
        "twice": REFUSED,
        "tools": REFUSED,
    },
)

# A token that ends the turn, and one that ends the text in the place of the generation prompt.
PHI_3 = ChatTemplate(
    source="""
{% for turn in messages %}
  {{- '<|' ~ turn.role ~ '|>\\n' ~ turn.content ~ '<|end|>\\n' -}}
{% endfor %}
{{- '<|assistant|>\\n' if add_generation_prompt else eos_token -}}
""",
    eos="<|endoftext|>",
    others=("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
    marked={
        "single": "<|user|>\nName a colour.<|end|>\n<|assistant|>\n[[Blue.<|end|>\n<|endoftext|>]]",
        "system": "<|system|>\nBe brief.<|end|>\n<|user|>\nName a colour.<|end|>\n<|assistant|>\n[[Blue.<|end|>]]\n"
        "<|user|>\nAnd another?<|end|>\n<|assistant|>\n[[Red.<|end|>\n<|endoftext|>]]",
        "spaces": "<|user|>\n  Name a colour. \n<|end|>\n<|assistant|>\n[[\n Blue. \n<|end|>]]\n"
        "<|user|>\nAnd another?<|end|>\n<|assistant|>\n[[ Red. <|end|>\n<|endoftext|>]]",
        "echo": "<|user|>\nBlue.<|end|>\n<|assistant|>\n[[Blue.<|end|>]]\n"
        "<|user|>\nassistant<|end|>\n<|assistant|>\n[[assistant<|end|>\n<|endoftext|>]]",
        "thinking": "<|user|>\nName a colour.<|end|>\n<|assistant|>\n[[<think>\nWarm?\n</think>\n\nRed.<|end|>]]\n"
        "<|user|>\nAnd another?<|end|>\n<|assistant|>\n"
        "[[<think>\nCold?\n</think>\n\nBlue.<|end|>\n<|endoftext|>]]",
        "twice": "<|user|>\nName a colour.<|end|>\n<|assistant|>\n[[Blue.<|end|>]]\n"
        "<|assistant|>\n[[Or red.<|end|>\n<|endoftext|>]]",
    },
)

# Roles are text; BOS and EOS are one token, written at the beginning and after turns of the assistant only.
OLMO_2 = ChatTemplate(
    source="""
{{- bos_token -}}
{% for turn in messages %}
  {{- '<|' ~ turn.role ~ '|>\\n' ~ turn.content -}}
  {{- eos_token if turn.role == 'assistant' else '' -}}
  {{- '' if loop.last and turn.role == 'assistant' else '\\n' -}}
{% endfor %}
{{- '<|assistant|>\\n' if add_generation_prompt else '' -}}
""",
    bos="<|endoftext|>",
    eos="<|endoftext|>",
    marked={
        "single": "<|endoftext|><|user|>\nName a colour.\n<|assistant|>\n[[Blue.<|endoftext|>]]",
        "system": "<|endoftext|><|system|>\nBe brief.\n<|user|>\nName a colour.\n<|assistant|>\n"
        "[[Blue.<|endoftext|>]]\n<|user|>\nAnd another?\n<|assistant|>\n[[Red.<|endoftext|>]]",
        "spaces": "<|endoftext|><|user|>\n  Name a colour. \n\n<|assistant|>\n[[\n Blue. \n<|endoftext|>]]\n"
        "<|user|>\nAnd another?\n<|assistant|>\n[[ Red. <|endoftext|>]]",
        "echo": "<|endoftext|><|user|>\nBlue.\n<|assistant|>\n[[Blue.<|endoftext|>]]\n"
        "<|user|>\nassistant\n<|assistant|>\n[[assistant<|endoftext|>]]",
        "thinking": "<|endoftext|><|user|>\nName a colour.\n<|assistant|>\n"
        "[[<think>\nWarm?\n</think>\n\nRed.<|endoftext|>]]\n<|user|>\nAnd another?\n<|assistant|>\n"
        "[[<think>\nCold?\n</think>\n\nBlue.<|endoftext|>]]",
        "twice": "<|endoftext|><|user|>\nName a colour.\n<|assistant|>\n[[Blue.<|endoftext|>]]\n"
        "<|assistant|>\n[[Or red.<|endoftext|>]]",
    },
)

# ChatML with a system turn in any case; BOS is the token that begins every turn.
SMOLLM_2 = ChatTemplate(
    source="""
{% if messages[0].role != 'system' %}
  {{- '<|im_start|>system\\nYou are SmolLM.<|im_end|>\\n' -}}
{% endif %}
{% for turn in messages %}
  {{- '<|im_start|>' ~ turn.role ~ '\\n' ~ turn.content ~ '<|im_end|>\\n' -}}
{% endfor %}
{{- '<|im_start|>assistant\\n' if add_generation_prompt else '' -}}
""",
    bos="<|im_start|>",
    eos="<|im_end|>",
    marked={
        "single": "<|im_start|>system\nYou are SmolLM.<|im_end|>\n<|im_start|>user\nName a colour.<|im_end|>\n"
        "<|im_start|>assistant\n[[Blue.<|im_end|>]]\n",
        "system": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nName a colour.<|im_end|>\n"
        "<|im_start|>assistant\n[[Blue.<|im_end|>]]\n<|im_start|>user\nAnd another?<|im_end|>\n"
        "<|im_start|>assistant\n[[Red.<|im_end|>]]\n",
        "spaces": "<|im_start|>system\nYou are SmolLM.<|im_end|>\n<|im_start|>user\n  Name a colour. \n<|im_end|>\n"
        "<|im_start|>assistant\n[[\n Blue. \n<|im_end|>]]\n<|im_start|>user\nAnd another?<|im_end|>\n"
        "<|im_start|>assistant\n[[ Red. <|im_end|>]]\n",
        "echo": "<|im_start|>system\nYou are SmolLM.<|im_end|>\n<|im_start|>user\nBlue.<|im_end|>\n"
        "<|im_start|>assistant\n[[Blue.<|im_end|>]]\n<|im_start|>user\nassistant<|im_end|>\n"
        "<|im_start|>assistant\n[[assistant<|im_end|>]]\n",
        "thinking": "<|im_start|>system\nYou are SmolLM.<|im_end|>\n<|im_start|>user\nName a colour.<|im_end|>\n"
        "<|im_start|>assistant\n[[<think>\nWarm?\n</think>\n\nRed.<|im_end|>]]\n"
        "<|im_start|>user\nAnd another?<|im_end|>\n"
        "<|im_start|>assistant\n[[<think>\nCold?\n</think>\n\nBlue.<|im_end|>]]\n",
        "twice": "<|im_start|>system\nYou are SmolLM.<|im_end|>\n<|im_start|>user\nName a colour.<|im_end|>\n"
        "<|im_start|>assistant\n[[Blue.<|im_end|>]]\n<|im_start|>assistant\n[[Or red.<|im_end|>]]\n",
    },
)

# Its generation blocks hold the header and the line break after the turn as well; with thinking off every turn has an
# empty block.
SMOLLM_3 = ChatTemplate(
    source="""
{% set mode = '/think' if enable_thinking is not defined or enable_thinking else '/no_think' %}
{% set empty = '<think>\\n\\n</think>\\n' if mode == '/no_think' else '' %}
{% set given = messages[0].role == 'system' %}
{{- '<|im_start|>system\\n## Metadata\\n\\nReasoning Mode: ' ~ mode ~ '\\n\\n## Custom Instructions\\n\\n' -}}
{{- (messages[0].content if given else 'You are SmolLM.') ~ '\\n\\n<|im_end|>\\n' -}}
{% for turn in (messages[1:] if given else messages) %}
  {% if turn.role == 'assistant' %}
    {% generation %}
      {{- '<|im_start|>assistant\\n' ~ empty ~ turn.content.lstrip('\\n') ~ '<|im_end|>\\n' -}}
    {% endgeneration %}
  {% else %}
    {{- '<|im_start|>' ~ turn.role ~ '\\n' ~ turn.content ~ '<|im_end|>\\n' -}}
  {% endif %}
{% endfor %}
{{- '<|im_start|>assistant\\n' ~ empty if add_generation_prompt else '' -}}
""",
    eos="<|im_end|>",
    others=("<|im_start|>",),
    marked={
        "single": "<|im_start|>system\n## Metadata\n\nReasoning Mode: /no_think\n\n## Custom Instructions\n\n"
        "You are SmolLM.\n\n<|im_end|>\n<|im_start|>user\nName a colour.<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n[[Blue.<|im_end|>]]\n",
        "system": "<|im_start|>system\n## Metadata\n\nReasoning Mode: /no_think\n\n## Custom Instructions\n\n"
        "Be brief.\n\n<|im_end|>\n<|im_start|>user\nName a colour.<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n[[Blue.<|im_end|>]]\n<|im_start|>user\nAnd another?<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n[[Red.<|im_end|>]]\n",
        "spaces": "<|im_start|>system\n## Metadata\n\nReasoning Mode: /no_think\n\n## Custom Instructions\n\n"
        "You are SmolLM.\n\n<|im_end|>\n<|im_start|>user\n  Name a colour. \n<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n[[ Blue. \n<|im_end|>]]\n"
        "<|im_start|>user\nAnd another?<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n[[ Red. <|im_end|>]]\n",
        "echo": "<|im_start|>system\n## Metadata\n\nReasoning Mode: /no_think\n\n## Custom Instructions\n\n"
        "You are SmolLM.\n\n<|im_end|>\n<|im_start|>user\nBlue.<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n[[Blue.<|im_end|>]]\n<|im_start|>user\nassistant<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n[[assistant<|im_end|>]]\n",
        "thinking": "<|im_start|>system\n## Metadata\n\nReasoning Mode: /no_think\n\n## Custom Instructions\n\n"
        "You are SmolLM.\n\n<|im_end|>\n<|im_start|>user\nName a colour.<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n[[<think>\nWarm?\n</think>\n\nRed.<|im_end|>]]\n"
        "<|im_start|>user\nAnd another?<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n[[<think>\nCold?\n</think>\n\nBlue.<|im_end|>]]\n",
        "twice": "<|im_start|>system\n## Metadata\n\nReasoning Mode: /no_think\n\n## Custom Instructions\n\n"
        "You are SmolLM.\n\n<|im_end|>\n<|im_start|>user\nName a colour.<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n[[Blue.<|im_end|>]]\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n[[Or red.<|im_end|>]]\n",
    },
)

# No header for the system text, no line breaks; thoughts are removed from every turn, also the last.
DEEPSEEK = ChatTemplate(
    source="""
{{- bos_token -}}
{% for turn in messages %}
  {% if turn.role == 'system' %}
    {{- turn.content -}}
  {% elif turn.role == 'user' %}
    {{- '<｜User｜>' ~ turn.content -}}
  {% else %}
    {{- '<｜Assistant｜>' ~ turn.content.split('</think>')[-1] ~ eos_token -}}
  {% endif %}
{% endfor %}
{{- '<｜Assistant｜>' if add_generation_prompt else '' -}}
""",
    bos="<｜begin▁of▁sentence｜>",
    eos="<｜end▁of▁sentence｜>",
    others=("<｜User｜>", "<｜Assistant｜>"),
    marked={
        "single": "<｜begin▁of▁sentence｜><｜User｜>Name a colour.<｜Assistant｜>[[Blue.<｜end▁of▁sentence｜>]]",
        "system": "<｜begin▁of▁sentence｜>Be brief.<｜User｜>Name a colour."
        "<｜Assistant｜>[[Blue.<｜end▁of▁sentence｜>]]"
        "<｜User｜>And another?<｜Assistant｜>[[Red.<｜end▁of▁sentence｜>]]",
        "spaces": "<｜begin▁of▁sentence｜><｜User｜>  Name a colour. \n"
        "<｜Assistant｜>[[\n Blue. \n<｜end▁of▁sentence｜>]]<｜User｜>And another?"
        "<｜Assistant｜>[[ Red. <｜end▁of▁sentence｜>]]",
        "echo": "<｜begin▁of▁sentence｜><｜User｜>Blue.<｜Assistant｜>[[Blue.<｜end▁of▁sentence｜>]]"
        "<｜User｜>assistant<｜Assistant｜>[[assistant<｜end▁of▁sentence｜>]]",
        "thinking": "<｜begin▁of▁sentence｜><｜User｜>Name a colour.<｜Assistant｜>[[\n\nRed.<｜end▁of▁sentence｜>]]"
        "<｜User｜>And another?<｜Assistant｜>[[\n\nBlue.<｜end▁of▁sentence｜>]]",
        "twice": "<｜begin▁of▁sentence｜><｜User｜>Name a colour.<｜Assistant｜>[[Blue.<｜end▁of▁sentence｜>]]"
        "<｜Assistant｜>[[Or red.<｜end▁of▁sentence｜>]]",
    },
)

CHATML = ChatTemplate(
    source="""
{% for turn in messages %}
  {{- '<|im_start|>' ~ turn.role ~ '\\n' ~ turn.content ~ '<|im_end|>\\n' -}}
{% endfor %}
{{- '<|im_start|>assistant\\n' if add_generation_prompt else '' -}}
""",
    eos="<|im_end|>",
    others=("<|im_start|>",),
    marked={
        "single": "<|im_start|>user\nName a colour.<|im_end|>\n<|im_start|>assistant\n[[Blue.<|im_end|>]]\n",
        "system": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nName a colour.<|im_end|>\n"
        "<|im_start|>assistant\n[[Blue.<|im_end|>]]\n<|im_start|>user\nAnd another?<|im_end|>\n"
        "<|im_start|>assistant\n[[Red.<|im_end|>]]\n",
        "spaces": "<|im_start|>user\n  Name a colour. \n<|im_end|>\n"
        "<|im_start|>assistant\n[[\n Blue. \n<|im_end|>]]\n<|im_start|>user\nAnd another?<|im_end|>\n"
        "<|im_start|>assistant\n[[ Red. <|im_end|>]]\n",
        "echo": "<|im_start|>user\nBlue.<|im_end|>\n<|im_start|>assistant\n[[Blue.<|im_end|>]]\n"
        "<|im_start|>user\nassistant<|im_end|>\n<|im_start|>assistant\n[[assistant<|im_end|>]]\n",
        "thinking": "<|im_start|>user\nName a colour.<|im_end|>\n"
        "<|im_start|>assistant\n[[<think>\nWarm?\n</think>\n\nRed.<|im_end|>]]\n"
        "<|im_start|>user\nAnd another?<|im_end|>\n"
        "<|im_start|>assistant\n[[<think>\nCold?\n</think>\n\nBlue.<|im_end|>]]\n",
        "twice": "<|im_start|>user\nName a colour.<|im_end|>\n<|im_start|>assistant\n[[Blue.<|im_end|>]]\n"
        "<|im_start|>assistant\n[[Or red.<|im_end|>]]\n",
    },
)

# Roles are text, EOS ends every turn.
ZEPHYR = ChatTemplate(
    source="""
{% for turn in messages %}
  {{- '<|' ~ turn.role ~ '|>\\n' ~ turn.content ~ eos_token ~ '\\n' -}}
{% endfor %}
{{- '<|assistant|>\\n' if add_generation_prompt else '' -}}
""",
    bos="<s>",
    eos="</s>",
    marked={
        "single": "<|user|>\nName a colour.</s>\n<|assistant|>\n[[Blue.</s>]]\n",
        "system": "<|system|>\nBe brief.</s>\n<|user|>\nName a colour.</s>\n<|assistant|>\n[[Blue.</s>]]\n"
        "<|user|>\nAnd another?</s>\n<|assistant|>\n[[Red.</s>]]\n",
        "spaces": "<|user|>\n  Name a colour. \n</s>\n<|assistant|>\n[[\n Blue. \n</s>]]\n"
        "<|user|>\nAnd another?</s>\n<|assistant|>\n[[ Red. </s>]]\n",
        "echo": "<|user|>\nBlue.</s>\n<|assistant|>\n[[Blue.</s>]]\n"
        "<|user|>\nassistant</s>\n<|assistant|>\n[[assistant</s>]]\n",
        "thinking": "<|user|>\nName a colour.</s>\n<|assistant|>\n[[<think>\nWarm?\n</think>\n\nRed.</s>]]\n"
        "<|user|>\nAnd another?</s>\n<|assistant|>\n[[<think>\nCold?\n</think>\n\nBlue.</s>]]\n",
        "twice": "<|user|>\nName a colour.</s>\n<|assistant|>\n[[Blue.</s>]]\n<|assistant|>\n[[Or red.</s>]]\n",
    },
)

# The system text stands before the first user turn's; everything but BOS and EOS is text, as Vicuna's.
MERGED_SYSTEM = ChatTemplate(
    source="""
{% set given = messages[0].role == 'system' %}
{{- bos_token -}}
{% for turn in (messages[1:] if given else messages) %}
  {% if turn.role == 'user' %}
    {{- 'USER: ' ~ (messages[0].content ~ '\\n\\n' if given and loop.first else '') ~ turn.content ~ ' ' -}}
  {% else %}
    {{- 'ASSISTANT: ' ~ turn.content ~ eos_token -}}
  {% endif %}
{% endfor %}
{{- 'ASSISTANT:' if add_generation_prompt else '' -}}
""",
    bos="<s>",
    eos="</s>",
    marked={
        "single": "<s>USER: Name a colour. ASSISTANT:[[ Blue.</s>]]",
        "system": "<s>USER: Be brief.\n\nName a colour. ASSISTANT:[[ Blue.</s>]]"
        "USER: And another? ASSISTANT:[[ Red.</s>]]",
        "spaces": "<s>USER:   Name a colour. \n ASSISTANT:[[ \n Blue. \n</s>]]"
        "USER: And another? ASSISTANT:[[  Red. </s>]]",
        "echo": "<s>USER: Blue. ASSISTANT:[[ Blue.</s>]]USER: assistant ASSISTANT:[[ assistant</s>]]",
        "thinking": "<s>USER: Name a colour. ASSISTANT:[[ <think>\nWarm?\n</think>\n\nRed.</s>]]"
        "USER: And another? ASSISTANT:[[ <think>\nCold?\n</think>\n\nBlue.</s>]]",
        "twice": "<s>USER: Name a colour. ASSISTANT:[[ Blue.</s>]]ASSISTANT:[[ Or red.</s>]]",
    },
)

# Generation blocks from the content to the token that ends the turn.
GENERATION = ChatTemplate(
    source="""
{{- bos_token -}}
{% for turn in messages %}
  {{- '<|' ~ turn.role ~ '|>\\n' -}}
  {% if turn.role == 'assistant' %}
    {% generation %}
      {{- turn.content | trim ~ '<|end|>' -}}
    {% endgeneration %}
  {% else %}
    {{- turn.content | trim ~ '<|end|>' -}}
  {% endif %}
  {{- '\\n' -}}
{% endfor %}
{{- '<|assistant|>\\n' if add_generation_prompt else '' -}}
""",
    bos="<s>",
    eos="</s>",
    others=("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
    marked={
        "single": "<s><|user|>\nName a colour.<|end|>\n<|assistant|>\n[[Blue.<|end|>]]\n",
        "system": "<s><|system|>\nBe brief.<|end|>\n<|user|>\nName a colour.<|end|>\n<|assistant|>\n"
        "[[Blue.<|end|>]]\n<|user|>\nAnd another?<|end|>\n<|assistant|>\n[[Red.<|end|>]]\n",
        "spaces": "<s><|user|>\nName a colour.<|end|>\n<|assistant|>\n[[Blue.<|end|>]]\n"
        "<|user|>\nAnd another?<|end|>\n<|assistant|>\n[[Red.<|end|>]]\n",
        "echo": "<s><|user|>\nBlue.<|end|>\n<|assistant|>\n[[Blue.<|end|>]]\n"
        "<|user|>\nassistant<|end|>\n<|assistant|>\n[[assistant<|end|>]]\n",
        "thinking": "<s><|user|>\nName a colour.<|end|>\n<|assistant|>\n[[<think>\nWarm?\n</think>\n\nRed.<|end|>]]\n"
        "<|user|>\nAnd another?<|end|>\n<|assistant|>\n[[<think>\nCold?\n</think>\n\nBlue.<|end|>]]\n",
        "twice": "<s><|user|>\nName a colour.<|end|>\n<|assistant|>\n[[Blue.<|end|>]]\n<|assistant|>\n"
        "[[Or red.<|end|>]]\n",
    },
)

TEMPLATES = {
    "llama 3": LLAMA_3,
    "qwen 2.5": QWEN_2_5,
    "qwen 3": QWEN_3,
    "mistral": MISTRAL,
    "gemma": GEMMA,
    "phi 3": PHI_3,
    "olmo 2": OLMO_2,
    "smollm 2": SMOLLM_2,
    "smollm 3": SMOLLM_3,
    "deepseek": DEEPSEEK,
    "chatml": CHATML,
    "zephyr": ZEPHYR,
    "merged system": MERGED_SYSTEM,
    "generation blocks": GENERATION,
}


def _bad(loop: str, prompt: str = "<|assistant|>", **marked: str) -> ChatTemplate:
    source = f"{loop}{{{{ '{prompt}' if add_generation_prompt else '' }}}}"
    others = ("<|system|>", "<|user|>", "<|assistant|>", "<|bot|>", "<think>", "</think>")
    return ChatTemplate(source, marked, eos="</s>", others=others)


# Templates with which a text cannot be followed from message to rendering. They may be refused where the supervised
# part is given here as well, but must never be marked otherwise.
BAD_TEMPLATES = {
    "writes answers twice": _bad(
        "{% for turn in messages %}<|{{ turn.role }}|>{{ turn.content }}"
        "{% if turn.role == 'assistant' %} {{ turn.content }}{% endif %}</s>{% endfor %}",
        single="<|user|>Name a colour.</s><|assistant|>[[Blue. Blue.</s>]]",
        system="<|system|>Be brief.</s><|user|>Name a colour.</s><|assistant|>[[Blue. Blue.</s>]]"
        "<|user|>And another?</s><|assistant|>[[Red. Red.</s>]]",
    ),
    "quotes answers": _bad(
        "{% for turn in messages %}{% if not loop.first and loop.previtem.role == 'assistant' %}"
        "(You: {{ loop.previtem.content }}){% endif %}"
        "<|{{ turn.role }}|>{{ turn.content }}</s>{% endfor %}",
        single="<|user|>Name a colour.</s><|assistant|>[[Blue.</s>]]",
        system="<|system|>Be brief.</s><|user|>Name a colour.</s><|assistant|>[[Blue.</s>]]"
        "(You: Blue.)<|user|>And another?</s><|assistant|>[[Red.</s>]]",
    ),
    "shouts": _bad(
        "{% for turn in messages %}<|{{ turn.role }}|>{{ turn.content | upper }}</s>{% endfor %}",
        single="<|user|>NAME A COLOUR.</s><|assistant|>[[BLUE.</s>]]",
        system="<|system|>BE BRIEF.</s><|user|>NAME A COLOUR.</s><|assistant|>[[BLUE.</s>]]"
        "<|user|>AND ANOTHER?</s><|assistant|>[[RED.</s>]]",
    ),
    "replaces characters": _bad(
        "{% for turn in messages %}<|{{ turn.role }}|>{{ turn.content | replace('e', '') }}</s>{% endfor %}",
        single="<|user|>Nam a colour.</s><|assistant|>[[Blu.</s>]]",
        system="<|system|>B brif.</s><|user|>Nam a colour.</s><|assistant|>[[Blu.</s>]]"
        "<|user|>And anothr?</s><|assistant|>[[Rd.</s>]]",
    ),
    "writes users first": _bad(
        "{% for role in ('system', 'user', 'assistant') %}{% for turn in messages if turn.role == role %}"
        "<|{{ role }}|>{{ turn.content }}</s>{% endfor %}{% endfor %}",
        single="<|user|>Name a colour.</s><|assistant|>[[Blue.</s>]]",
        system="<|system|>Be brief.</s><|user|>Name a colour.</s><|user|>And another?</s>"
        "<|assistant|>[[Blue.</s>]]<|assistant|>[[Red.</s>]]",
    ),
    "drops earlier turns": _bad(
        "{% for turn in (messages[-1:] if add_generation_prompt else messages[-2:]) %}"
        "<|{{ turn.role }}|>{{ turn.content }}</s>{% endfor %}",
        single="<|user|>Name a colour.</s><|assistant|>[[Blue.</s>]]",
        system="<|user|>And another?</s><|assistant|>[[Red.</s>]]",
    ),
    "empties earlier thoughts": _bad(
        "{% for turn in messages %}<|{{ turn.role }}|>{% if turn.role == 'assistant' %}"
        "<think>{{ turn.reasoning_content if loop.last }}</think>{% endif %}{{ turn.content }}</s>{% endfor %}",
        reasoning="<|user|>Name a colour.</s><|assistant|>[[<think></think>Red.</s>]]"
        "<|user|>And another?</s><|assistant|>[[<think>Cold?</think>Blue.</s>]]",
    ),
    "prompts with a thought": _bad(
        "{% for turn in messages %}<|{{ turn.role }}|>{{ turn.content }}</s>{% endfor %}",
        prompt="<|assistant|><think>\\n",
        single="<|user|>Name a colour.</s><|assistant|>[[Blue.</s>]]",
        system="<|system|>Be brief.</s><|user|>Name a colour.</s><|assistant|>[[Blue.</s>]]"
        "<|user|>And another?</s><|assistant|>[[Red.</s>]]",
    ),
    "reverses": _bad(
        "{% for turn in messages | reverse %}<|{{ turn.role }}|>{{ turn.content }}</s>{% endfor %}",
        single=REFUSED,
        system=REFUSED,
    ),
    "writes no answers": _bad(
        "{% for turn in messages if turn.role != 'assistant' %}<|{{ turn.role }}|>{{ turn.content }}</s>{% endfor %}",
        single=REFUSED,
        system=REFUSED,
    ),
    "prompts with another header": _bad(
        "{% for turn in messages %}<|{{ turn.role }}|>{{ turn.content }}</s>{% endfor %}",
        prompt="<|bot|>",
        single=REFUSED,
        system=REFUSED,
    ),
}


def byte_level_tokenizer(template: ChatTemplate, line_breaks: int = 1) -> PreTrainedTokenizerFast:
    """A byte-level BPE with a template and its special tokens.

    Args:
        line_breaks: up to so many make one token.
    """
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    texts = [*TEXTS, *("\n" * count for count in range(line_breaks + 1))]
    trainer = trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    return _with_template(backend, template)


def metaspace_tokenizer(template: ChatTemplate) -> PreTrainedTokenizerFast:
    """A BPE in SentencePiece's manner: words are marked at their beginning, also the first; line breaks are bytes."""
    backend = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokens = [AddedToken(token, special=False) for token in ("<unk>", *(f"<0x{byte:02X}>" for byte in range(256)))]
    backend.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=500, special_tokens=tokens, show_progress=False))
    return _with_template(backend, template)


def _with_template(backend: Tokenizer, template: ChatTemplate) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=template.bos,
        eos_token=template.eos,
        additional_special_tokens=list(template.others),
        chat_template=template.source.lstrip("\n"),
    )
