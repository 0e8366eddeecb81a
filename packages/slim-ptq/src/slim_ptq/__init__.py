"""Post-training quantization of Hugging Face language models for Huawei Ascend and others."""

from slim_ptq.__about__ import __version__

__all__ = ["__version__"]
