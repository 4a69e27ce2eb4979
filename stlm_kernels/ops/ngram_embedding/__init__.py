"""ngram_embedding: embeddings of hashed byte n-grams, summed over their lengths."""

from .op import ngram_embedding

__all__ = ["ngram_embedding"]
