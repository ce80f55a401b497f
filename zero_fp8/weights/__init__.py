"""The model's weights: which of them a rank writes, and how the other ranks receive them."""
