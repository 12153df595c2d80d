"""The routing of the tokens of one text.

Shape suffixes: T tokens, L adapted Linears, E experts.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from transformers_patch.recorder import RoutingRecorder

REPLACEMENT = "\ufffd"  # stands for the bytes of an incomplete character


@dataclass(frozen=True)
class TokenRouting:
    """Router weights of some tokens.

    Args:
        modules: names of the adapted Linears, L of them.
        weights_TLE: float32, on the CPU.
    """

    modules: list[str]
    weights_TLE: Tensor


def route_tokens(model: nn.Module, ids: list[int], first: int = 0) -> TokenRouting:
    """The routing of a text from its token `first` on, in one forward pass over all of it.

    The weights of a token are those that the routers give it where it is read, not where it is predicted.
    """
    with torch.no_grad(), RoutingRecorder(model) as recorder:
        model(input_ids=torch.tensor([ids], device=model.device), logits_to_keep=1)
    weights = [weights.flatten(0, -2)[first:].float().cpu() for weights in recorder.weights.values()]
    return TokenRouting([name.split(".experts.")[0] for name in recorder.weights], torch.stack(weights, dim=1))


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[str]:
    """The text that each token adds to those before it.

    A character of several tokens belongs to the last of them; special tokens do not have a text.
    """
    texts: list[str] = []
    length = 0
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:end], skip_special_tokens=True)
        if text.endswith(REPLACEMENT) and end < len(ids):
            texts.append("")
        else:
            texts.append(text[length:])
            length = len(text)
    return texts
