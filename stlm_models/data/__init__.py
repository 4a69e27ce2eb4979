"""Data: documents of files, training windows over them, batches, the vocabulary of word models."""

from .corpus import Corpus, default_corpus, load_corpus
from .loader import Batch, Loader
from .windows import DocumentStream, TrainingWindows
from .words import WordVocabulary

__all__ = [
    "Batch",
    "Corpus",
    "DocumentStream",
    "Loader",
    "TrainingWindows",
    "WordVocabulary",
    "default_corpus",
    "load_corpus",
]
