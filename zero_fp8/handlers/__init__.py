"""The optimizers that DeepSpeed's engine uses in place of its own ZeRO optimizers."""
