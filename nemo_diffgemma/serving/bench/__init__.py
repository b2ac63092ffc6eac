"""Load on a server that runs: what a client measures. No torch.

calls.py: what is asked; client.py: one request; load.py: many at a time; report.py: figures, table, plot; server.py: a
server for the measurement.
"""
