"""A dry run: the real code on CUDA tensors that are not there, one process playing one rank of any world.

    launch/dry_run.py        the command
    driver.py, driver.c      a CUDA driver with a GPU that does not exist, so that torch chooses kernels for it
    mode.py                  every operation on a GPU tensor passes here, and runs on its shape alone
    shadows.py               values of small tensors, where these follow from the host's
    memory.py, waits.py, communication.py, products.py, streams.py, flex.py      what is counted
    ledger.py                the counts, by phase
    world.py                 process groups of other ranks that are not there
    play.py                  a training step, or a generation
    whole.py                 many layers from three small networks
    report.py                tables, violations and the JSON line

docs/dry_run.md says how to read the result and what it cannot see.
"""
