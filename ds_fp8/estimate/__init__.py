"""Bytes per parameter and on the wire, before anything is allocated."""
