"""An `STLM` as a Hugging Face model: loss with shifted labels, `generate`, `from_pretrained`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GenerationMixin, LogitsProcessor, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from stlm_models import DOCUMENT_START, STLM
from stlm_models.cached import CachedRun
from stlm_models.checkpoint import load_tensors
from stlm_models.config import BYTES, IGNORED
from stlm_models.decoding import check_writes_bytes, lost_logits

from .configuration_stlm import STLMHFConfig

# What transformers calls the state of `generate`: "cache" since 5.24, "past_key_values" before.
_CACHE = "cache" if "cache" in CausalLMOutputWithPast.__annotations__ else "past_key_values"


class STLMForCausalLM(PreTrainedModel, GenerationMixin):
    """An `STLM`, in `model.stlm`, with the interface of a causal language model of transformers.

    Its table is one parameter, which input and output use: nothing is tied in transformers' sense.
    `generate` draws bytes only (`generation_config.suppress_tokens`); `model.stlm.generate` takes
    and gives bytes and knows what to do beyond the context. A Trainer's `label_smoothing_factor`
    must stay 0: it shifts the labels of models that transformers knows by name, and of no others.
    """

    config_class = STLMHFConfig
    base_model_prefix = "stlm"
    main_input_name = "input_ids"
    _no_split_modules = ("STLM",)
    # What has been cached cannot be taken back, as assisted generation needs it.
    _is_stateful = True

    def __init__(self, config: STLMHFConfig) -> None:
        super().__init__(config)
        self.stlm = STLM(config.model_config)
        self.post_init()
        self.generation_config.bos_token_id = DOCUMENT_START
        self.generation_config.suppress_tokens = list(range(BYTES, config.vocab_size))

    @classmethod
    def from_stlm(cls, model: STLM) -> STLMForCausalLM:
        """A copy of a model, such as `stlm_models.checkpoint.load_model` gives, in eval mode.

        Raises:
            ValueError: for a core of the user's own, which no configuration describes.
        """
        copy = cls(STLMHFConfig(model.config))
        load_tensors(copy.stlm, model.state_dict())
        return copy.eval()

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As in transformers, but tensors that are missing or left over are an error.

        Raises:
            ValueError: naming them.
        """
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        wrong = {kind: sorted(map(str, found)) for kind, found in info.items() if found}
        if wrong:
            raise ValueError(f"checkpoint: expected the tensors of its configuration, got {wrong}")
        return (model, info) if output_loading_info else model

    def forward(
        self,
        input_ids: Tensor,  # (B, T)
        attention_mask: Tensor | None = None,  # (B, T)
        labels: Tensor | None = None,  # (B, T)
        cache: GrowingTexts | None = None,
        past_key_values: GrowingTexts | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits of the next bytes, and the loss where labels are given.

        Args:
            input_ids: each row one document, id 256 before its bytes.
            attention_mask: 0 where a row has no byte, wherever that is: all else comes out as if it
                were not there. None is ones; right padding needs no mask.
            labels: `input_ids` with -100 where nothing is to be predicted: label t is predicted by
                position t - 1. Special ids are no targets, so padding and id 256 want -100.
            cache, use_cache: of `generate`: each byte runs once; not differentiable.
            past_key_values: the name of cache before transformers 5.24.
            logits_to_keep: how many last positions get logits (0 is all), or which.
            num_items_in_batch: what the summed loss is divided by: the targets of all batches whose
                gradients are added up. None is those of this batch.

        Returns:
            loss (0-d, nats), logits (B, kept, vocab_size) fp32 or None in training with labels,
            which would cost memory that the loss does not need.

        Raises:
            ValueError: for any other argument that is set, because it would be ignored.
        """
        _refuse(kwargs)
        texts = past_key_values if cache is None else cache
        if texts is not None and labels is not None:
            raise ValueError("labels: expected None beside a cache, got a tensor")
        if texts is not None or (use_cache and labels is None):
            output = self._grow(input_ids, attention_mask, texts, logits_to_keep)
        else:
            output = self._run(
                input_ids, attention_mask, labels, logits_to_keep, num_items_in_batch
            )
        return output.to_tuple() if return_dict is False else output

    def _run(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        labels: Tensor | None,
        logits_to_keep: int | Tensor,
        num_items_in_batch: Tensor | int | None,
    ) -> CausalLMOutputWithPast:
        order = _bytes_first(attention_mask)
        if labels is None:
            hidden = _restore(self.stlm.hidden(_reorder(input_ids, order)), order)
            return CausalLMOutputWithPast(logits=self._logits(hidden, logits_to_keep))
        ids, labels = _reorder(input_ids, order), _reorder(labels, order)
        targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
        if self.training:
            loss_sum, n_valid = self.stlm(ids, targets)
        else:
            hidden = self.stlm.hidden(ids)
            loss_sum, n_valid = self.stlm.embedding.loss(hidden, targets)
        if num_items_in_batch is None:
            loss = loss_sum / n_valid.clamp(min=1)
        else:
            loss = loss_sum / torch.as_tensor(num_items_in_batch, device=loss_sum.device)
        if self.training:
            return CausalLMOutputWithPast(loss=loss)
        logits = self._logits(_restore(hidden, order), logits_to_keep)
        return CausalLMOutputWithPast(loss=loss, logits=logits)

    @torch.no_grad()
    def _grow(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        texts: GrowingTexts | None,
        logits_to_keep: int | Tensor,
    ) -> CausalLMOutputWithPast:
        if texts is None:
            texts = GrowingTexts(self.stlm, input_ids, attention_mask)
        else:
            texts.append(input_ids)
        if not isinstance(logits_to_keep, int) or logits_to_keep != 1:
            raise ValueError(f"logits_to_keep: expected 1 with a cache, got {logits_to_keep}")
        logits = self.stlm.embedding.logits(texts.run.hidden[:, None])
        return CausalLMOutputWithPast(logits=logits, **{_CACHE: texts})

    def _logits(self, hidden: Tensor, keep: int | Tensor) -> Tensor:
        kept = hidden[:, slice(-keep, None) if isinstance(keep, int) else keep]
        return self.stlm.embedding.logits(kept)

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, *args: Any, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """As in transformers; prompts padded on the right are refused.

        Raises:
            ValueError: for those, whose continuation would stand behind their padding, and for a
                model that writes no bytes.
        """
        check_writes_bytes(self.stlm)
        if attention_mask is not None and not attention_mask[:, -1].all():
            raise ValueError(
                "attention_mask: expected prompts padded on the left"
                ' (tokenizer(..., padding_side="left")), got one padded on the right'
            )
        return super().prepare_inputs_for_generation(
            input_ids, *args, attention_mask=attention_mask, **kwargs
        )

    def _prepare_attention_mask_for_generation(
        self, inputs_tensor: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        # transformers takes every padding id for padding, id 256 before a document among them.
        is_start = (inputs_tensor == DOCUMENT_START).long()
        leading = is_start.cumprod(1)
        mask = 1 - leading * F.pad(leading[:, 1:], (0, 1))
        mask[:, -1] -= is_start[:, -1] - leading[:, -1]  # right padding, which is refused
        return mask

    def _get_logits_processor(self, *args: Any, **kwargs: Any) -> Any:
        # Greedy search would take NaN for the largest of all, whatever id it stands at.
        processors = super()._get_logits_processor(*args, **kwargs)
        processors.insert(0, _RefuseLostLogits())
        return processors

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # ours is made by the first step

    def _init_weights(self, module: torch.nn.Module) -> None:
        """Nothing: an `STLM` initialises itself, and a checkpoint holds every tensor."""


class _RefuseLostLogits(LogitsProcessor):
    """The error that `STLM.generate` raises, in that of transformers."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        peaks = scores.amax(-1)
        lost = ~peaks.isfinite()
        if lost.any():
            row = int(lost.nonzero()[0])
            raise lost_logits(peaks[row], f"row {row} after {input_ids.shape[1]} ids")
        return scores


class GrowingTexts:
    """What `generate` hands from step to step: a `CachedRun` and the ids that it has seen.

    Args:
        model: that runs.
        input_ids, attention_mask: as in `STLMForCausalLM.forward`.
    """

    is_compileable = False
    is_linear = (False,)  # as far as transformers is concerned: it may go on from here

    def __init__(self, model: STLM, input_ids: Tensor, attention_mask: Tensor | None) -> None:
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        rows = zip(input_ids, mask, strict=True)
        self.windows = [ids[kept.bool()].tolist() for ids, kept in rows]
        self.run = CachedRun(model, self.windows)
        self.length = input_ids.shape[1]

    def append(self, input_ids: Tensor) -> None:
        """More ids for each row, (B, N)."""
        rows = range(len(self.windows))
        if input_ids.dim() != 2 or len(input_ids) != len(rows):
            expected, got = f"({len(rows)}, N)", tuple(input_ids.shape)
            raise ValueError(f"input_ids: expected shape {expected} with a cache, got {got}")
        for ids in input_ids.T:
            for window, byte in zip(self.windows, ids.tolist(), strict=True):
                window.append(byte)
            self.run.step(ids, rows)
        self.length += input_ids.shape[1]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i goes on from row beam_idx[i]; a row whose text changes by that is run anew."""
        before = self.windows
        self.windows = [list(before[i]) for i in beam_idx.tolist()]
        changed = [i for i, window in enumerate(self.windows) if window != before[i]]
        if changed:
            self.run.restart(changed, [self.windows[i] for i in changed])

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """How many columns of ids, padding among them, it has been shown."""
        return self.length


def _refuse(arguments: dict[str, Any]) -> None:
    for name, value in arguments.items():
        if value is not None and value is not False:
            raise ValueError(f"{name}: expected None, which an STLM has no use for, got a value")


def _bytes_first(attention_mask: Tensor | None) -> Tensor | None:
    """Positions of each row, those with a byte first and in their order; None is as they are."""
    if attention_mask is None:
        return None
    return attention_mask.bool().int().argsort(dim=1, descending=True, stable=True)


def _reorder(x: Tensor, order: Tensor | None) -> Tensor:
    return x if order is None else x.gather(1, order)


def _restore(hidden: Tensor, order: Tensor | None) -> Tensor:
    """Rows (B, T, D) of reordered positions, back at the positions that they belong to."""
    return (
        hidden if order is None else hidden.gather(1, order.argsort(1)[..., None].expand_as(hidden))
    )


STLMForCausalLM.register_for_auto_class("AutoModelForCausalLM")
