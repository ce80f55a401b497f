"""Who owns which bytes, and when they travel.

A gradient's way: hook -> bucket -> exchange -> shard (`gradients`, `comm`).
A weight's way: shard -> sweep -> gather -> parameter (`optimizer`, `comm`, `weights`).
`partition` says where everything lies, `handler` answers DeepSpeed's engine, `checkpoint` writes
and reads the shard.
"""
