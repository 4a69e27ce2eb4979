"""Train with Hugging Face's Trainer, save, load, generate: `python examples/hf_trainer.py`.

Needs `pip install '.[hf]' accelerate`. What works there: docs/huggingface.md.
"""

import tempfile

from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

from stlm_models import ModelConfig
from stlm_models.huggingface import ByteTokenizer, STLMForCausalLM, STLMHFConfig


def main() -> None:
    """Print the loss of the first and of the last step, and what the loaded model writes."""
    shape = ModelConfig(byte_dim=64, core_dim=64, core_ff=128, decoder_ff=128, context=128)
    tokenizer, model = ByteTokenizer(), STLMForCausalLM(STLMHFConfig(shape))
    rows = [tokenizer(text) for text in ["your own text", "of any length"] * 16]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=20,
            learning_rate=3e-3,
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            use_cpu=True,  # without it the Trainer takes a GPU where there is one
            disable_tqdm=True,
        )
        collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
        trainer = Trainer(model, arguments, train_dataset=rows, data_collator=collator)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        print(f"loss: {float(losses[0]):.2f} nats, then {float(losses[-1]):.2f}")

        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        loaded = AutoModelForCausalLM.from_pretrained(folder)
        prompt = AutoTokenizer.from_pretrained(folder)("your", return_tensors="pt")
        text = loaded.generate(**prompt, max_new_tokens=9, do_sample=False)
    print(tokenizer.decode(text[0], skip_special_tokens=True))


if __name__ == "__main__":
    main()
