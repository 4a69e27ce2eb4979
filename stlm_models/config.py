"""The options of a model: plain values, checked once."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

TOKENS = ("bytes", "words")
PATCH_RULES = ("space", "fixed", "external", "none")
POOLINGS = ("mean", "sum", "max", "min", "first", "last", "attention")
ENCODERS = ("causal", "patch")
UNPOOLINGS = ("read", "ema")
OUTPUTS = ("autoregressive", "parallel")
BYTES = 256
BOS_ID = 256
"""The id put before each document, and before an empty prompt; never a target."""
IGNORED = -100
"""The target of a position that counts for nothing."""
LONGEST_CONTEXT, MOST_SLOTS = 64, 2**24
"""Of a `TextMemory`."""
HASH_MULTIPLIERS = (
    1_000_000_007,
    5_915_587_277,
    1_500_450_271,
    3_267_000_013,
    5_754_853_343,
    4_093_082_899,
    9_576_890_767,
    3_628_273_133,
    2_860_486_313,
    5_463_458_053,
    3_367_900_313,
)
"""The primes of BLT's hash functions, in its order."""


@dataclass(frozen=True)
class ModelConfig:
    """The shape of an `STLM`; `ModelConfig(**json.loads(json.dumps(config.to_dict())))` is equal.

    Each field is documented where it stands.

    Raises:
        ValueError: for a value out of range, naming the field, what it expects and what it got.

    >>> config = ModelConfig(core_layers=6, pooling="attention", pooling_heads=4)
    >>> ModelConfig(**config.to_dict()) == config
    True
    """

    vocab_size: int = 257
    """256 bytes and the special ids behind them; at least 257."""
    tokens: str = "bytes"
    """Meaning of an id: "bytes", or "words", the baseline of byte models, which goes with
    patch_rule "none" and can be trained and judged, but writes no bytes.
    """
    tied: bool = True
    """The output projection shares the table of the embeddings; otherwise it has its own."""
    byte_dim: int = 128
    """Width D at byte rate, and of the tied table."""
    patch_rule: str = "space"
    patch_size: int | None = None
    max_patch_len: int | None = 16
    """Patch rule and its options, as in `stlm_kernels.find_patches`. Rule "external": each call
    brings its `patches`, such as those of a tokenizer, and nothing is generated. Rule "none" is a
    flat model, a decoder over all positions: it has no patches, pooling and core (core_layers 0);
    the other core options are not read.
    """
    max_patches: int | None = None
    """Slots of a whole call in training, for static shapes where the model makes its patches
    itself; what finds no slot reads the last slot of its document. Evaluation and generation
    take as many as there are. None: so does training.
    """
    pooling: str = "mean"
    """Pooling of the bytes of a patch into its input, as in `BytePooling`; "attention" with
    `pooling_heads` heads. The seed paper's code averages over padded slots, so that a patch
    depends on how much padding it has; here only real bytes count.
    """
    pooling_heads: int | None = None
    encoder: str = "causal"
    encoder_layers: int = 0
    encoder_heads: int = 2
    encoder_kv_heads: int = 2
    encoder_ff: int = 320
    """Attention over bytes before they are pooled; no layers is none. "causal": within
    decoder_window; its states are pooled and are what the decoder adds. "patch": within each
    patch and both ways, as in the paper; its states know bytes that are yet to be predicted, so
    they are pooled and never added: the decoder adds plain embeddings.
    """
    ngram_sizes: tuple[int, ...] = (2,)
    """Lengths of the hashed n-grams whose embeddings join the pooled input, in a flat model each
    position's own; () is none. Each has a table of `ngram_buckets` rows, `ngram_dim` wide, for
    each hash function.
    """
    ngram_buckets: int = 4096
    ngram_dim: int = 32
    ngram_hashes: int = 1
    """Hash functions, 1 to 11: BLT's, in its order. The more, the less often two n-grams share all
    their rows.
    """
    byte_ngrams: bool = False
    """N-grams that end at a byte join its own state too, which the encoder reads and the decoder
    adds; flat models do so anyway, the parallel output reads no bytes.
    """
    match_sizes: tuple[int, ...] = ()
    """Lengths of repeats whose followers join each byte's own state, as in
    `stlm_models.layers.matches.MatchEmbedding`; () is none. The parallel output reads no bytes.
    """
    memory_sizes: tuple[int, ...] = ()
    """Lengths of contexts whose followers in the training text join each byte's own state, as in
    `stlm_models.layers.memory.TextMemory` with `memory_slots` entries of 4 bytes; () is none. The
    parallel output reads no bytes.
    """
    memory_slots: int = 2**22
    core_layers: int = 2
    core_dim: int = 256
    core_heads: int = 4
    core_kv_heads: int = 4
    core_ff: int = 512
    """The transformer over patches."""
    unpooling: str = "read"
    """Reading of patch states by bytes: "read", the last complete one; "ema", a running average of
    them, each new one weighed by a gate of its own (H-Net's smoothing), of which generation
    keeps one for each text. The parallel output reads core states alone.
    """
    decoder_layers: int = 3
    decoder_heads: int = 2
    decoder_kv_heads: int = 2
    decoder_ff: int = 320
    """The transformer over bytes."""
    decoder_window: int | None = 128
    """Number of bytes back, itself included, that a byte attends to; None is all."""
    share_ff: bool = False
    """One SwiGLU for all layers of the encoder, one for the core's, one for the decoder's, as in
    the paper's feed-forward sharing.
    """
    output: str = "autoregressive"
    """"autoregressive": the decoder runs over bytes and predicts each from those before it.
    "parallel": the paper's head: all bytes of a patch at once from the state of the patch
    before, by attention both ways between the slots of a patch (decoder_window None). Its slots
    are patch_size or max_patch_len, which must be set. logits[t] is the slot of byte t+1: slot
    0 where t closes its patch. Real bytes alone are counted in the loss; the paper's code masks
    an id that never occurs and so counts padding. It doubles the slots where it adds their
    positions (2x + pe); here a linear map and rotary positions tell slots apart.
    """
    reconstruction_weight: float = 1.0
    """Weight of the parallel output's second loss in training: the same head decodes each patch's
    core input back to its bytes (mean over bytes; special ids do not count, right padding does).
    """
    qk_norm: bool = True
    rope_base: float = 10000.0
    """Norm and rotary base of every attention."""
    logit_scale: float = 1.0
    softcap: float | None = None
    """Scale and soft cap of the tied output projection."""
    context: int = 1024
    """Bytes that training and generation show the model at once."""
    checkpointing: bool = False
    """Training keeps the inputs of blocks alone and runs each again in the backward pass: less
    memory, more time, the same model. `STLM.checkpointing` changes it.
    """

    def __post_init__(self) -> None:
        # JSON knows lists only; a tuple keeps the config hashable and equal to what was written.
        for name in ("ngram_sizes", "match_sizes", "memory_sizes"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        self._check_types()
        self._check_ranges()
        self._check_patching()
        self._check_pooling()
        self._check_output()
        if self.patch_rule == "none":
            self._check_flat()

    @property
    def slots(self) -> int | None:
        """The most bytes that a patch may have, where that is known."""
        limits = [n for n in (self.patch_size, self.max_patch_len) if n is not None]
        return min(limits, default=None)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for `json.dumps`."""
        return dataclasses.asdict(self)

    def _check_types(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            optional = "None" in str(field.type)
            if value is None and optional:
                continue
            expected = str(field.type).removesuffix(" | None")
            if not _has_type(value, expected):
                _refuse(field.name, f"{expected}{' or None' if optional else ''}", value)

    def _check_ranges(self) -> None:
        _at_least("vocab_size", BYTES + 1, self.vocab_size)
        for name in ("byte_dim", "ngram_buckets", "ngram_dim", "core_dim", "core_ff", "encoder_ff"):
            _at_least(name, 1, getattr(self, name))
        for name in ("core_layers", "decoder_layers", "encoder_layers"):
            _at_least(name, 0, getattr(self, name))
        for name in ("decoder_ff", "decoder_window", "max_patch_len", "max_patches"):
            if getattr(self, name) is not None:
                _at_least(name, 1, getattr(self, name))
        _at_least("context", 2, self.context)
        for size in self.ngram_sizes:
            _at_least("ngram_sizes", 1, size)
        if not 1 <= self.ngram_hashes <= len(HASH_MULTIPLIERS):
            _refuse("ngram_hashes", f"1 to {len(HASH_MULTIPLIERS)}", self.ngram_hashes)
        check_match_sizes(self.match_sizes, self.vocab_size)
        check_memory(self.memory_sizes, self.memory_slots)
        if self.byte_ngrams and not self.ngram_sizes:
            _refuse("byte_ngrams", "False without ngram_sizes", True)
        for name in ("rope_base", "logit_scale", "softcap"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                _refuse(name, "a finite number above 0", value)
        check_heads("core", self.core_dim, self.core_heads, self.core_kv_heads)
        if not 0 <= self.reconstruction_weight < math.inf:
            _refuse(
                "reconstruction_weight", "a finite number of at least 0", self.reconstruction_weight
            )
        if self.encoder_layers:
            check_heads("encoder", self.byte_dim, self.encoder_heads, self.encoder_kv_heads)
        check_heads("decoder", self.byte_dim, self.decoder_heads, self.decoder_kv_heads)

    def _check_patching(self) -> None:
        _one_of("tokens", TOKENS, self.tokens)
        _one_of("patch_rule", PATCH_RULES, self.patch_rule)
        if self.patch_rule == "fixed":
            if self.patch_size is None or self.patch_size < 1:
                _refuse(
                    "patch_size", 'an int of at least 1 with patch_rule "fixed"', self.patch_size
                )
        elif self.patch_size is not None:
            _refuse("patch_size", f'None with patch_rule "{self.patch_rule}"', self.patch_size)
        if self.tokens == "words" and self.patch_rule != "none":
            _refuse("patch_rule", '"none" with tokens "words"', self.patch_rule)
        if self.tokens == "words" and self.memory_sizes:
            _refuse("memory_sizes", '() with tokens "words"', self.memory_sizes)
        if self.patch_rule == "external" and self.max_patches is not None:
            _refuse("max_patches", 'None with patch_rule "external"', self.max_patches)

    def _check_pooling(self) -> None:
        _one_of("pooling", POOLINGS, self.pooling)
        _one_of("encoder", ENCODERS, self.encoder)
        heads, dim = self.pooling_heads, self.byte_dim
        if self.pooling != "attention":
            if heads is not None:
                _refuse("pooling_heads", f'None with pooling "{self.pooling}"', heads)
        elif heads is None or heads < 1 or dim % heads:
            _refuse("pooling_heads", f'a divisor of {dim} with pooling "attention"', heads)

    def _check_output(self) -> None:
        _one_of("output", OUTPUTS, self.output)
        _one_of("unpooling", UNPOOLINGS, self.unpooling)
        if self.output == "autoregressive":
            return
        if self.decoder_window is not None:
            _refuse("decoder_window", 'None with output "parallel"', self.decoder_window)
        if self.unpooling != "read":
            _refuse("unpooling", '"read" with output "parallel"', self.unpooling)
        if self.byte_ngrams:
            _refuse("byte_ngrams", 'False with output "parallel"', True)
        for name in ("match_sizes", "memory_sizes"):
            if getattr(self, name):
                _refuse(name, '() with output "parallel"', getattr(self, name))
        if self.slots is None:
            _refuse("max_patch_len", 'at least 1 with output "parallel"', None)

    def _check_flat(self) -> None:
        without = {
            "core_layers": 0,
            "encoder_layers": 0,
            "pooling": "mean",
            "max_patches": None,
            "byte_ngrams": False,
            "unpooling": "read",
            "output": "autoregressive",
        }
        for name, value in without.items():
            if getattr(self, name) != value:
                _refuse(name, f'{value!r} with patch_rule "none"', getattr(self, name))


def check_heads(
    where: str, dim: int, heads: int, kv_heads: int, head_dim: int | None = None
) -> int:
    """The head width, or a ValueError where heads do not divide as attention needs."""
    for name, value in ((f"{where}_heads", heads), (f"{where}_kv_heads", kv_heads)):
        _at_least(name, 1, value)
    if heads % kv_heads:
        _refuse(f"{where}_kv_heads", f"a divisor of {where}_heads = {heads}", kv_heads)
    if head_dim is None:
        if dim % heads:
            _refuse(f"{where}_heads", f"a divisor of the width {dim}", heads)
        head_dim = dim // heads
    if head_dim < 2 or head_dim % 2:
        _refuse(f"{where} head width", "an even number, for rotary positions", head_dim)
    return head_dim


def id_bits(vocab_size: int) -> int:
    """Bits that an id takes."""
    return (vocab_size - 1).bit_length()


def check_match_sizes(sizes: tuple[int, ...], vocab_size: int) -> None:
    """Refuse sizes whose ids do not pack into a positive int64, with a ValueError."""
    most = 63 // id_bits(vocab_size)
    if not all(1 <= size <= most for size in sizes):
        _refuse("match_sizes", f"sizes of 1 to {most} for {vocab_size} ids", sizes)


def check_memory(sizes: tuple[int, ...], slots: int) -> None:
    """Refuse lengths and numbers of entries that a `TextMemory` cannot have, with a ValueError."""
    if not all(1 <= size <= LONGEST_CONTEXT for size in sizes):
        _refuse("memory_sizes", f"sizes of 1 to {LONGEST_CONTEXT}", sizes)
    if not 1 <= slots <= MOST_SLOTS or slots & (slots - 1):
        _refuse("memory_slots", f"a power of two up to {MOST_SLOTS}", slots)


def _has_type(value: object, expected: str) -> bool:
    if expected == "bool":
        return isinstance(value, bool)
    if isinstance(value, bool):
        return False
    if expected == "float":
        return isinstance(value, int | float)
    if expected == "tuple[int, ...]":
        return isinstance(value, tuple) and all(_has_type(item, "int") for item in value)
    return isinstance(value, {"int": int, "str": str}[expected])


def _one_of(name: str, choices: tuple[str, ...], value: str) -> None:
    if value not in choices:
        _refuse(name, f"one of {choices}", value)


def _at_least(name: str, least: int, value: int) -> None:
    if value < least:
        _refuse(name, f"at least {least}", value)


def _refuse(name: str, expected: str, got: object) -> None:
    raise ValueError(f"{name}: expected {expected}, got {got!r}")


def config_from_dict(values: object) -> ModelConfig:
    """`ModelConfig(**values)`, with a ValueError for anything that is not a config."""
    if not isinstance(values, dict):
        raise ValueError(f"config: expected an object of named values, got {values!r}")
    known = {field.name for field in dataclasses.fields(ModelConfig)}
    unknown = sorted(str(name) for name in values if name not in known)
    if unknown:
        raise ValueError(f"config: expected the fields of ModelConfig, got also {unknown}")
    return ModelConfig(**values)
