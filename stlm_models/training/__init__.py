"""Training: the trainer, optimisers, objectives, reports of a run. Import from its modules."""
