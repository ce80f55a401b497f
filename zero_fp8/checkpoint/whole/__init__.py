"""The whole model out of a checkpoint: put together if it was split, and written as a model's files."""
