"""Train a byte-level model in a loop of your own: `python examples/plain_loop.py`.

The corpus is this file. Needs seconds on a CPU and nothing beyond `pip install .`.
"""

from pathlib import Path

import torch

from stlm_models import STLM, ModelConfig, bits_per_byte
from stlm_models.data import TrainingWindows
from stlm_models.parallel import mean_loss
from stlm_models.training.optim import Optimizers, lr_scale

STEPS = 80
SHAPE = ModelConfig(
    byte_dim=64,
    ngram_sizes=(2, 3, 4),
    ngram_buckets=512,
    byte_ngrams=True,
    core_layers=1,
    core_dim=64,
    core_ff=128,
    decoder_layers=1,
    decoder_ff=128,
    context=128,
)


def main() -> None:
    """Print bits per byte before and after, and what the model then writes."""
    torch.manual_seed(0)
    text = Path(__file__).read_bytes()
    model = STLM(SHAPE)
    print(f"before: {bits_per_byte(model, text):.2f} bits per byte")

    windows = TrainingWindows([text], context=128, batch_size=4, seed=0)
    optimizers = Optimizers(model, muon_lr=0.02, adamw_lr=0.004)  # also clears the gradients
    for step in range(STEPS):
        batch = windows.batch(step)  # packed: ids (T,), targets (T,), documents by prefix sums
        loss_sum, n_valid = model(batch.byte_ids, batch.targets, cu_seqlens=batch.cu_seqlens)
        loss, _ = mean_loss(loss_sum, n_valid)  # over all processes, where there are several
        loss.backward()
        optimizers.step(lr_scale(step / STEPS))

    print(f"after: {bits_per_byte(model, text):.2f} bits per byte")
    print(model.generate(b"from stlm", max_new_bytes=40, temperature=0.0))


if __name__ == "__main__":
    main()
