"""The Adam states of the blocks that a rank owns, and their sweep."""
