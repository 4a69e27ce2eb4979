"""Train with Hugging Face's accelerate: `python examples/accelerate_loop.py`.

Needs `pip install accelerate`. `accelerate launch` runs the same file in several processes.
"""

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, TensorDataset

from stlm_models import BOS_ID, STLM, ModelConfig

EPOCHS = 5


def main() -> None:
    """Print the loss of the first and of the last step."""
    torch.manual_seed(0)
    rows = TensorDataset(torch.tensor([[BOS_ID, *b"every row is a document"]] * 32))
    model = STLM(ModelConfig(byte_dim=64, core_dim=64, core_ff=128, decoder_ff=128, context=128))
    accelerator = Accelerator()
    model, optimizer, loader = accelerator.prepare(
        model, torch.optim.AdamW(model.parameters(), lr=3e-3), DataLoader(rows, batch_size=4)
    )
    losses = []
    for _ in range(EPOCHS):
        for (ids,) in loader:
            loss_sum, n_valid = model(ids[:, :-1], ids[:, 1:])  # the model shifts nothing itself
            loss = loss_sum / n_valid
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
    accelerator.print(f"loss: {losses[0]:.2f} nats, then {losses[-1]:.2f}")


if __name__ == "__main__":
    main()
