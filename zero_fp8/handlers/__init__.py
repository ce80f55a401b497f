"""What DeepSpeed's engine calls in place of its own ZeRO optimizers."""
