"""FP8 weights as the user's own parameters, and FP8 products that use them."""
