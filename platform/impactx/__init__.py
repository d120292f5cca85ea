"""IMPACTX (arXiv 2502.12222): classifiers that learn to predict their own explanations."""

__version__ = "0.1.0"
