"""RazorAttention KV-cache compression: head search for RoPE and ALiBi models and the cache that applies it."""

from slim_ra.__about__ import __version__

__all__ = ["__version__"]
