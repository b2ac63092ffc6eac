"""How good a model is: held-out measures, and comparison with transformers. Needs neither gradient nor NeMo."""
