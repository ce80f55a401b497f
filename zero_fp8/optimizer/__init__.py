"""FP8AdamW: hyperparameters of a run in DeepSpeed, and an optimizer that works alone."""
