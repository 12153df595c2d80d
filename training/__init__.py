"""The Trainer and what surrounds it: checkpoints, the run folder, stopping and ending, speed, the report of a run."""
