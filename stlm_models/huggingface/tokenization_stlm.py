"""Bytes as the tokens of a Hugging Face tokenizer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from transformers import AddedToken, PreTrainedTokenizer

from stlm_models import DOCUMENT_START

BYTES = 256
DOCUMENT = "<|document|>"
"""How id 256 is written in text that is shown; in text that is read these are 12 bytes."""


class ByteTokenizer(PreTrainedTokenizer):
    """UTF-8 bytes as ids 0 to 255, behind id 256, which begins a document and pads.

    Right padding (the default) trains as it is, with labels of -100 there, such as
    `DataCollatorForLanguageModeling(tokenizer, mlm=False)` sets. Prompts of a batch are padded on
    the left: `tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt")`.

    No text ever becomes id 256: what looks like a special token is encoded as its bytes.
    """

    model_input_names = ("input_ids", "attention_mask")

    def __init__(self, **kwargs: Any) -> None:
        document = AddedToken(DOCUMENT, normalized=False, special=True)
        self._added_tokens_decoder = {DOCUMENT_START: document}
        defaults = {
            "bos_token": document,
            "pad_token": document,
            "split_special_tokens": True,
            "clean_up_tokenization_spaces": False,
        }
        super().__init__(**{**defaults, **kwargs})

    def encode_bytes(self, data: bytes) -> list[int]:
        """The ids of a document of any bytes, as `encode` gives them for text."""
        return [DOCUMENT_START, *data]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes among the ids, exactly; `decode` replaces what is not UTF-8."""
        return bytes(i for i in map(int, ids) if i != DOCUMENT_START)

    @property
    def vocab_size(self) -> int:
        return BYTES

    def get_vocab(self) -> dict[str, int]:
        return {chr(i): i for i in range(BYTES)} | self._added_tokens_encoder

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """Id 256 and the bytes; a pair is one document, such as a prompt and what follows."""
        return [DOCUMENT_START, *token_ids_0, *(token_ids_1 or [])]

    def get_special_tokens_mask(
        self,
        token_ids_0: list[int],
        token_ids_1: list[int] | None = None,
        already_has_special_tokens: bool = False,
    ) -> list[int]:
        """1 where the id is not a byte."""
        if not already_has_special_tokens:
            token_ids_0 = self.build_inputs_with_special_tokens(token_ids_0, token_ids_1)
        return [int(i >= BYTES) for i in token_ids_0]

    def create_token_type_ids_from_sequences(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """Zeros: a pair is one document."""
        return [0] * len(self.build_inputs_with_special_tokens(token_ids_0, token_ids_1))

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Text of byte tokens; what is not UTF-8 becomes the replacement character."""
        encoder = self._added_tokens_encoder
        pieces = (t.encode() if t in encoder else bytes([ord(t)]) for t in tokens)
        return b"".join(pieces).decode("utf-8", "replace")

    def save_vocabulary(
        self, save_directory: str, filename_prefix: str | None = None
    ) -> tuple[str, ...]:
        """Nothing: bytes need no file."""
        return ()

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        return [chr(byte) for byte in text.encode()]

    def _convert_token_to_id(self, token: str) -> int:
        return ord(token)

    def _convert_id_to_token(self, index: int) -> str:
        if not 0 <= index < BYTES:
            raise ValueError(f"ids: expected 0 to {DOCUMENT_START}, got {index}")
        return chr(index)


ByteTokenizer.register_for_auto_class("AutoTokenizer")
