"""A cluster that is computed instead of run: discrete events, the product's own decisions, modelled times.

    settings.py   the two files: a cluster (device, links, directory, sizes) and a workload (agents, arrivals)
    device.py     what a step of the engine takes
    fabric.py     links, directory shards (the real `Table`), arenas
    worker.py     one worker: the real step scheduler's choices, in modelled seconds
    run.py        pipelines through the cluster: the real router, planners and break-even
    results.py    percentiles, totals, the table
    sweep.py      modes x numbers of workers
    validate.py   a report of `relay run` beside the same run simulated
    plot.py       pictures of a result

What is real: `router.route_pipeline` and `rates.Rates`, `workers.scheduler.choose`, `workers.methods` and
`workers.costs`, `workers.break_even`, `transport.directory.table` and its ring, `workers.layout`. What is
modelled: seconds. What is left out is said in docs/scale.md.
"""
