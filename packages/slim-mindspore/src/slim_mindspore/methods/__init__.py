"""Quantization algorithms in numpy; they know nothing of networks or files."""
