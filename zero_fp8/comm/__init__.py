"""Process groups, collectives over them, and errors that every rank raises alike."""
