"""An `STLM` among Hugging Face's transformers: config, model with `generate`, byte tokenizer.

    model = STLMForCausalLM.from_stlm(load_model(run))
    model.save_pretrained(folder), ByteTokenizer().save_pretrained(folder)
    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

The saved folder holds copies of the files of this package, which import an installed `stlm`.
With this package imported no trust_remote_code is needed, and nothing of the folder runs.
"""

from ..checkpoint import require_extra

require_extra(["transformers"])

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer  # noqa: E402

from .configuration_stlm import STLMHFConfig  # noqa: E402
from .modeling_stlm import STLMForCausalLM  # noqa: E402
from .tokenization_stlm import ByteTokenizer  # noqa: E402

__all__ = ["ByteTokenizer", "STLMForCausalLM", "STLMHFConfig"]

AutoConfig.register(STLMHFConfig.model_type, STLMHFConfig)
AutoModelForCausalLM.register(STLMHFConfig, STLMForCausalLM)
AutoTokenizer.register(STLMHFConfig, slow_tokenizer_class=ByteTokenizer)
