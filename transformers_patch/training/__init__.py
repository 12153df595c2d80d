"""The Trainer and what surrounds it: flags (`arguments.py`), base model and adapter (`base_model.py`), losses and
evaluation (`trainer.py`), the run's folder (`run_folder.py`), and what a run reports (`report.py`)."""
