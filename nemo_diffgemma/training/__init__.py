"""Training: the NeMo model class, its Lightning strategy, callbacks and the run configuration."""
