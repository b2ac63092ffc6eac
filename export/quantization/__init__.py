"""Quantised expert matrices in FP8, INT4 and NVFP4: their nodes in a graph and the ranges of activations."""
