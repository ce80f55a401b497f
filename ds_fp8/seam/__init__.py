"""What DeepSpeed's engine does differently when its config enables FP8."""
