"""Prune and sparsify fastai and PyTorch models, exactly as much as asked."""
__version__ = "0.1.0"
