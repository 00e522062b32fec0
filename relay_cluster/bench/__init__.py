"""`relay bench`: what the project claims, measured by commands that anyone can run.

    common.py     order of measurements, statistics, documents with a checked schema
    texts.py      data sets and natural text of a given number of tokens
    ttft.py       time to first token at one worker, segments local
    chain.py      KVCOMM's five agents over Ray workers, everything inside the time to first token
    cases.py      chains of agents whose answers are really decoded, for fidelity.py
    fidelity.py   distance from full prefill's answers
    decay.py      speed-up while novel queries keep arriving and the arena evicts
    decode.py     tokens per second beside transformers
    directory.py  calls per second of the directory's shards, with many segments in them
    transfer.py   blocks between two processes, beside memcpy and a raw socket; transfer_*.py: its processes
    plots.py      pictures; show.py tables

All of them call product code: a benchmark never computes anything that a request would not.
"""
