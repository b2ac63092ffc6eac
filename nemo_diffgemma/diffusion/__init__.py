"""The method, as functions on tensors: noise, corruption, objective, sampler, generation. Imports torch only."""
