"""Names, finds and moves bytes: the arena, the backends that read a peer's arena, and the KV directory.

Knows nothing of models or prompts. Nothing is imported here, so that `transport.settings` stays cheap:

    from transport.arena import Arena
    from transport.auto import make_transport, available_backends
    from transport.directory.client import DirectoryClient
    from transport.directory.local import LocalDirectory

A relayed segment, seen from this room: the owner allocates blocks, fills and seals them, and publishes the
segment; the reader leases it, allocates blocks of its own, pulls (read -> verify -> commit), and releases the
lease; the owner evicts unleased segments when its arena is full, and frees their blocks.
"""
