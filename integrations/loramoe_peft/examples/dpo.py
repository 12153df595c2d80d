"""Preference training (DPO) of a mixture with TRL: python examples/dpo.py [BASE_MODEL] [OUTPUT]"""

import sys

from datasets import Dataset
from trl import DPOConfig, DPOTrainer

from loramoe_peft import LoraMoeConfig, LoraMoeTrainerMixin

base_model, output = (sys.argv[1:] + ["HuggingFaceTB/SmolLM2-135M-Instruct", "outputs/dpo"][len(sys.argv) - 1 :])[:2]


class Trainer(LoraMoeTrainerMixin, DPOTrainer):
    """Passes the column `task_type` on to the balance term, once for each answer of a pair."""


rows = [
    {"prompt": "The capital of France is", "chosen": " Paris.", "rejected": " Lyon.", "task_type": 0},
    {"prompt": "The largest planet is", "chosen": " Jupiter.", "rejected": " Mars.", "task_type": 0},
    {"prompt": "Write backwards: abc ->", "chosen": " cba", "rejected": " abc", "task_type": 1},
    {"prompt": "Write backwards: tree ->", "chosen": " eert", "rejected": " tree", "task_type": 1},
] * 4

trainer = Trainer(
    model=base_model,  # without its adapter it is the reference model as well
    args=DPOConfig(
        output_dir=output,
        max_steps=10,
        per_device_train_batch_size=4,
        learning_rate=2e-4,
        logging_steps=1,
        bf16=False,
        report_to="none",
    ),
    train_dataset=Dataset.from_list(rows),
    peft_config=LoraMoeConfig(r=4, lora_nums=6, num_task_types=2, blc_weight=0.1),
)
trainer.train()  # logs balance_loss
trainer.save_model(output)
