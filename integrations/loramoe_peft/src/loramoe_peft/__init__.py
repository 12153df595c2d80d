"""LoRAMoE as a method of PyPI's peft: `import loramoe_peft` registers it, under the adapter type LORAMOE.

`_method/` is the method, copied from the LoRAMoE repository when this package is built; the other files are what peft
and the trainers of transformers and TRL ask for: `config.py`, `layer.py`, `model.py`, `saved.py`; `balance.py` brings
the gradient of the balance term to the routers, `trainer.py` what a trainer knows of it.
"""

from .config import LoraMoeConfig
from .layer import LoraMoeLayer
from .model import LoraMoeModel
from .registration import register
from .trainer import LoraMoeTrainerMixin, TaskTypeCollator

__all__ = ["LoraMoeConfig", "LoraMoeLayer", "LoraMoeModel", "LoraMoeTrainerMixin", "TaskTypeCollator"]

register()
