"""The "fp8" section, the rest of a ds_config, and how errors are worded."""
