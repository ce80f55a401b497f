"""The model's weights: what a rank writes of them, and how the others receive it."""
