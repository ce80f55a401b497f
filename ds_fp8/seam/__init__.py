"""The replaced methods of DeepSpeed's engine, used when its config enables FP8."""
