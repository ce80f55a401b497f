"""Who owns which bytes. Integers only, the same on every rank; nothing else is cut by a world size."""
