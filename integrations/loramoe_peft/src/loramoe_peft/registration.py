"""Making LORAMOE one of peft's methods and its trainers' concern."""

import transformers.trainer
from peft import PeftType
from peft.utils import register_peft_method

from .config import LoraMoeConfig
from .model import LoraMoeModel
from .trainer import BalanceCallback

NAME = "LORAMOE"


def register() -> None:
    """Add the method to peft, and `BalanceCallback` to every Trainer made from now on.

    `register_peft_method` accepts members of the enumeration `PeftType` only, so one is added to that first.
    """
    if NAME in PeftType.__members__:
        return
    member = str.__new__(PeftType, NAME)
    member._name_ = member._value_ = NAME
    PeftType._member_names_.append(NAME)
    PeftType._member_map_[NAME] = PeftType._value2member_map_[NAME] = member
    type.__setattr__(PeftType, NAME, member)
    register_peft_method(
        name=NAME.lower(), config_cls=LoraMoeConfig, model_cls=LoraMoeModel, prefix=LoraMoeModel.prefix
    )
    transformers.trainer.DEFAULT_CALLBACKS.append(BalanceCallback)
