"""Who owns which bytes. Integers only, the same on every rank; nobody else multiplies by a world size."""
