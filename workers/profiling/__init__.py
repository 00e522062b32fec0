"""How a model tolerates reuse, measured: the parts of `workers/profiler.py`.

tasks       calibration texts -> prompts of a chain of agents, and of the agents that read them
lab         decodes and prefills on the product's own engine, loop and executor
measure     deviations of decode KV from full prefill's, and errors of method texts
statistics  rank correlation, sparsity and position of deviations; plain numbers
choose      the rule that turns measured rows into a profile; pure
"""
