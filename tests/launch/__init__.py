"""The entry points: their configuration, their processes, their output."""
