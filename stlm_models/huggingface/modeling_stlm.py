"""An `STLM` as a Hugging Face model: loss with shifted labels, `generate`, `from_pretrained`."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GenerationMixin, PreTrainedModel
from transformers.generation import StoppingCriteriaList
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from stlm_models import BOS_ID, STLM, TiedEmbedding
from stlm_models.checkpoint import load_tensors
from stlm_models.config import BYTES
from stlm_models.generation.engine import check_writes_bytes
from stlm_models.layers.transformer import TransformerBlock

from .apart_stlm import load_parts
from .arguments_stlm import (
    Wanted,
    check_cache,
    check_new_ids,
    choice_of,
    refuse_others,
    targets_of,
)
from .backbone_stlm import Backbone, OutputTable
from .configuration_stlm import STLMHFConfig
from .growing_stlm import ByteStops, GrowingTexts, RefuseLostLogits
from .layout_stlm import Layout, layout_of, without_leading_padding

# What transformers calls the state of `generate`: "cache" since 5.24, "past_key_values" before.
_CACHE = "cache" if "cache" in CausalLMOutputWithPast.__annotations__ else "past_key_values"


class CheckpointedBlock(GradientCheckpointingLayer, TransformerBlock):
    """A block of an `STLM` that `gradient_checkpointing_enable` finds."""

    forward = TransformerBlock.forward


class STLMForCausalLM(PreTrainedModel, GenerationMixin):
    """An `STLM`, in `model.stlm`, with the interface of a causal language model of transformers.

    Its table is one parameter, which input and output use: nothing is tied in transformers' sense.
    Only bytes have probability: the logit of id 256 is the lowest number there is.
    `model.stlm.generate` takes and gives bytes and knows what to do beyond the context.
    """

    config_class = STLMHFConfig
    base_model_prefix = "stlm"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _no_split_modules = ("STLM",)
    # What has been cached cannot be taken back, as assisted generation needs it.
    _is_stateful = True

    def __init__(self, config: STLMHFConfig) -> None:
        super().__init__(config)
        self.stlm = STLM(config.model_config)
        checkpointing, self.stlm.checkpointing = self.stlm.checkpointing, False
        for module in self.stlm.modules():
            if type(module) is TransformerBlock:
                module.__class__ = CheckpointedBlock
        tied = self.stlm.config.tied
        self.output_table = OutputTable(self.stlm, self._valid_vocab) if tied else None
        self.post_init()
        # For readers of the config; the logits say so too.
        self.generation_config.suppress_tokens = list(range(BYTES, config.vocab_size))
        if checkpointing:
            self.gradient_checkpointing_enable()

    @classmethod
    def from_stlm(cls, model: STLM) -> STLMForCausalLM:
        """A copy of a model, such as `stlm_models.checkpoint.load_model` gives, in eval mode.

        Raises:
            ValueError: for a core of the user's own, which no configuration describes.
        """
        copied = cls(STLMHFConfig(model.config))
        load_tensors(copied.stlm, model.state_dict())
        return copied.eval()

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """Load as in transformers, but tensors that are missing or left over are an error.

        With output_loading_info they are named there instead. Joined matrices may lie apart.

        Raises:
            ValueError: naming them.
        """
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        load_parts(model, info, *args[:1], **kwargs)
        if output_loading_info:
            return model, info
        wrong = {kind: sorted(map(str, found)) for kind, found in info.items() if found}
        if wrong:
            raise ValueError(f"checkpoint: expected the tensors of its configuration, got {wrong}")
        return model

    def forward(
        self,
        input_ids: Tensor | None = None,  # (B, T)
        attention_mask: Tensor | None = None,  # (B, T)
        labels: Tensor | None = None,  # (B, T)
        cache: GrowingTexts | None = None,
        past_key_values: GrowingTexts | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        return_dict: bool | None = None,
        position_ids: Tensor | None = None,  # (B, T) or (1, T)
        shift_labels: Tensor | None = None,  # (B, T)
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        cu_seq_lens_q: Tensor | None = None,  # (S+1,)
        seq_idx: Tensor | None = None,  # (1, T)
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits of the next bytes, and the loss where labels are given.

        Args:
            input_ids: each row one document, id 256 before its bytes, or documents packed.
            attention_mask: 0 where a row has no byte, wherever that is: all else comes out as if it
                were not there. None is ones, but where a row begins with several ids 256: the last
                begins its document, the others are padding. Right padding needs no mask.
            labels: `input_ids` with -100 where nothing is to be predicted: label t is predicted by
                position t - 1. Nor is anything predicted where the label is a special id, is masked
                or begins a document.
            cache, use_cache: each byte runs once; not differentiable. Hand on what a call returns
                as `cache`, with the ids that are new.
            past_key_values: the name of cache before transformers 5.24.
            logits_to_keep: how many last positions get logits (0 is all), or which.
            num_items_in_batch: what the summed loss is divided by: the targets of all batches whose
                gradients are added up. None is those of this batch.
            position_ids: rise by one within a document; where a row begins anew, so does a
                document (`DataCollatorWithFlattening`).
            shift_labels: in place of labels, label t being predicted by position t.
            output_hidden_states: the inputs of the decoder's blocks over bytes, and last what the
                table is multiplied with, each (B, T, hidden_size).
            output_attentions: of these blocks, (B, heads, T, T) each; not beside a cache.
            cu_seq_lens_q, seq_idx: boundaries or numbers of packed documents in place of
                position_ids; cu_seq_lens_k, max_length_q and max_length_k say the same and are
                not read.

        Returns:
            loss (0-d, nats), logits (B, kept, vocab_size) fp32 or None in training with labels,
            which would cost memory that the loss does not need; cache, hidden_states and attentions
            where asked for.

        Raises:
            ValueError: for what does not fit, and any other argument that is set, because it would
                be ignored.
        """
        refuse_others(kwargs)
        if input_ids is None or input_ids.dim() != 2:
            got = None if input_ids is None else tuple(input_ids.shape)
            raise ValueError(f"input_ids: expected shape (B, T), got {got}")
        wanted = Wanted(
            logits_to_keep,
            choice_of(output_hidden_states, self.config, "output_hidden_states"),
            choice_of(output_attentions, self.config, "output_attentions"),
        )
        texts = check_cache(past_key_values if cache is None else cache)
        trained = labels is not None or shift_labels is not None
        if num_items_in_batch is not None and not trained:
            raise ValueError(
                "num_items_in_batch: expected None without labels, got a value. A Trainer passes it"
                " where it smooths labels itself: label_smoothing_factor must be 0, because it"
                " spreads over ids that are no bytes. For a compute_loss_func set"
                " model.accepts_loss_kwargs = False first"
            )
        if texts is not None and trained:
            raise ValueError("labels: expected None beside a cache, got a tensor")
        layout = layout_of(
            input_ids,
            attention_mask if texts is None else None,
            position_ids if texts is None else None,
            cu_seq_lens_q,
            seq_idx,
        )
        if texts is not None:
            check_new_ids(input_ids, attention_mask, position_ids)
            output = self._grow(input_ids, texts, wanted)
        elif use_cache and not trained:
            output = self._begin(input_ids, layout, wanted)
        elif trained:
            targets = targets_of(layout, labels, shift_labels, self.config)
            output = self._judge(input_ids, layout, targets, num_items_in_batch, wanted)
        else:
            output = CausalLMOutputWithPast(**self._run(input_ids, layout, wanted)[1])
        if return_dict is None:
            return_dict = self.config.return_dict
        return output.to_tuple() if return_dict is False else output

    def _run(
        self, input_ids: Tensor, layout: Layout, wanted: Wanted
    ) -> tuple[Tensor, dict[str, Any]]:
        """The states as they are shown, and the outputs that do not depend on labels."""
        with wanted.recorded(self.stlm, layout) as recording:
            shown = self.stlm.hidden(layout.take(input_ids), cu_seqlens=layout.cu_seqlens)
        hidden = layout.put_back(shown)
        logits = self._logits(hidden, wanted.logits, layout.kept)
        return shown, {"logits": logits, **wanted.outputs(recording, hidden)}

    def _judge(
        self,
        input_ids: Tensor,
        layout: Layout,
        targets: Tensor,
        num_items_in_batch: Tensor | int | None,
        wanted: Wanted,
    ) -> CausalLMOutputWithPast:
        outputs: dict[str, Any] = {}
        if self.training and not wanted.records:  # the logits would cost memory for nothing
            loss_sum, n_valid = self.stlm.byte_loss(
                layout.take(input_ids), targets, cu_seqlens=layout.cu_seqlens
            )
        else:
            shown, outputs = self._run(input_ids, layout, wanted)
            loss_sum, n_valid = self.stlm.embedding.loss(
                shown, targets, valid_vocab=self._valid_vocab
            )
        if num_items_in_batch is None:
            loss = loss_sum / n_valid.clamp(min=1)
        else:
            loss = loss_sum / torch.as_tensor(num_items_in_batch, device=loss_sum.device)
        return CausalLMOutputWithPast(loss=loss, **outputs)

    def _begin(
        self,
        input_ids: Tensor,
        layout: Layout,
        wanted: Wanted,
    ) -> CausalLMOutputWithPast:
        """The outputs at a prompt, and the texts that go on from there."""
        if layout.cu_seqlens is not None:
            raise ValueError("use_cache: expected False beside packed documents, got True")
        texts = GrowingTexts(self.stlm, input_ids, layout.kept)
        only_the_last = isinstance(wanted.logits, int) and wanted.logits == 1
        if only_the_last and not wanted.records and not torch.is_grad_enabled():
            outputs = {"logits": self._logits(texts.run.hidden[:, None], 1)}
        else:
            outputs = self._run(input_ids, layout, wanted)[1]
        return CausalLMOutputWithPast(**outputs, **{_CACHE: texts})

    @torch.no_grad()
    def _grow(
        self, input_ids: Tensor, texts: GrowingTexts, wanted: Wanted
    ) -> CausalLMOutputWithPast:
        if wanted.attentions:
            raise ValueError(
                "output_attentions: expected False beside a cache, which keeps no weights, got"
                " True; generate(..., use_cache=False) gives them"
            )
        layout = Layout((input_ids.shape[0], input_ids.shape[1]))
        texts.prepare()
        with wanted.recorded(self.stlm, layout) as recording:
            hidden = texts.append(input_ids)
        return CausalLMOutputWithPast(
            logits=self._logits(hidden, wanted.logits),
            **wanted.outputs(recording, hidden),
            **{_CACHE: texts},
        )

    @property
    def _valid_vocab(self) -> int | None:
        """The ids that have probability; of a model of words all."""
        return BYTES if self.stlm.config.tokens == "bytes" else None

    def _logits(self, hidden: Tensor, keep: int | Tensor, has_id: Tensor | None = None) -> Tensor:
        """Logits of hidden states (B, T, D); where no id is (B, T), id 256 is certain to follow."""
        columns = slice(-keep, None) if isinstance(keep, int) else keep
        logits = self.stlm.embedding.logits(hidden[:, columns], valid_vocab=self._valid_vocab)
        # Not -infinity, whose differences and products with zero are NaN in what others make of it.
        least = torch.finfo(logits.dtype).min
        logits = F.pad(logits, (0, self.config.vocab_size - logits.shape[-1]), value=least)
        if has_id is None or self._valid_vocab is None:
            return logits
        certain = logits.new_full(logits.shape[-1:], least)
        certain[BOS_ID] = 0
        return torch.where(has_id[:, columns, None], logits, certain)

    def get_input_embeddings(self) -> TiedEmbedding:
        """The table. Bytes are pooled from it too, which hooks on its output do not see."""
        return self.stlm.embedding

    def set_input_embeddings(self, value: torch.nn.Module) -> None:
        """Another table of the same shape.

        Raises:
            ValueError: for anything but a `stlm_models.TiedEmbedding` of these ids and this width.
        """
        table = self.stlm.embedding
        expected = f"a {type(table).__name__}({table.vocab_size}, {table.embedding_dim})"
        if type(value) is not type(table):
            raise ValueError(f"value: expected {expected}, got {type(value).__name__}")
        assert isinstance(value, TiedEmbedding)
        if (value.vocab_size, value.weight.shape) != (table.vocab_size, table.weight.shape):
            got = f"{value.vocab_size} ids in {tuple(value.weight.shape)}"
            raise ValueError(f"value: expected {expected}, got {got}")
        self.stlm.embedding = value

    @property
    def base_model(self) -> Backbone:
        """Return the module whose states the table is multiplied with, for losses of others."""
        return Backbone(self.stlm)

    def get_output_embeddings(self) -> OutputTable | None:
        """The rows of the table that have probability; untied models have none to show."""
        return self.output_table

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any
    ) -> TiedEmbedding:
        """The table, as it is.

        Raises:
            ValueError: for another number of ids than there are.
        """
        vocab_size = self.config.vocab_size
        if new_num_tokens not in (None, vocab_size) or any(args) or any(kwargs.values()):
            raise ValueError(
                f"new_num_tokens: expected {vocab_size}, the bytes and the special ids, which are"
                f" all that text is made of, got {new_num_tokens}"
            )
        return self.stlm.embedding

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, *args: Any, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Generate as in transformers; prompts padded on the right are refused.

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
        for name in ("tokenizer", "assistant_tokenizer"):  # of `generate`, which leaves them here
            kwargs.pop(name, None)
        inputs = super().prepare_inputs_for_generation(
            input_ids, *args, attention_mask=attention_mask, **kwargs
        )
        if inputs.get(_CACHE) is not None:
            inputs.pop("position_ids", None)  # a cache knows where it is
        return inputs

    def _get_stopping_criteria(
        self,
        generation_config: Any,
        stopping_criteria: StoppingCriteriaList | None = None,
        **kwargs: Any,
    ) -> StoppingCriteriaList:
        stops = generation_config.stop_strings
        without = copy.copy(generation_config)
        without.stop_strings = None
        criteria = super()._get_stopping_criteria(without, stopping_criteria, **kwargs)
        if stops is not None:
            criteria.append(ByteStops([stops] if isinstance(stops, str) else stops))
        return criteria

    def _prepare_attention_mask_for_generation(
        self, inputs_tensor: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        # transformers takes every padding id for padding, id 256 before a document among them.
        kept = without_leading_padding(inputs_tensor)
        mask = torch.ones_like(inputs_tensor) if kept is None else kept.long()
        is_start = (inputs_tensor == BOS_ID).long()
        mask[:, -1] -= is_start[:, -1] - is_start.prod(1)  # right padding, which is refused
        return mask

    def _get_logits_processor(self, *args: Any, **kwargs: Any) -> Any:
        # Greedy search would take NaN for the largest of all, whatever id it stands at.
        processors = super()._get_logits_processor(*args, **kwargs)
        processors.insert(0, RefuseLostLogits())
        return processors

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # ours is made by the first step

    def _init_weights(self, module: torch.nn.Module) -> None:
        """Nothing: an `STLM` initialises itself, and a checkpoint holds every tensor."""


STLMForCausalLM.register_for_auto_class("AutoModelForCausalLM")
# Where transformers asks a name whether it is a causal model's: its text-generation pipeline, and
# whether labels are to be shifted.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.setdefault("stlm", "STLMForCausalLM")
