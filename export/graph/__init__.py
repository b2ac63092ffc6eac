"""Graphs: the model as traceable functions, its weights, the denoising loop, and the cost of a graph."""
