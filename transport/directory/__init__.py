"""Where segments are: a sharded, soft-state directory with leases.

`table` decides, `shard` is its Ray shell, `client` routes to shards, `local` serves one process.
"""
