"""Pretraining: images, models, the loop (train.py) and what it leaves in the folder of a run."""
