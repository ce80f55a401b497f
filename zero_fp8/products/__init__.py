"""FP8 weights as the user's own parameters, and the FP8 products that are made with them."""
