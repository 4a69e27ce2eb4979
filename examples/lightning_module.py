"""Train with Lightning: `python examples/lightning_module.py`. Needs `pip install lightning`."""

import lightning
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from stlm_models import BOS_ID, STLM, ModelConfig


class ByteModule(lightning.LightningModule):
    """A model that Lightning trains; the loss of each step is kept in `losses`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.model = STLM(config)
        self.losses: list[float] = []

    def training_step(self, batch: tuple[Tensor]) -> Tensor:
        """Return the mean loss of ids (B, T), each row a document that begins with `BOS_ID`."""
        (ids,) = batch
        loss_sum, n_valid = self.model(ids[:, :-1], ids[:, 1:])
        loss: Tensor = loss_sum / n_valid
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return AdamW over all parameters."""
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def main() -> None:
    """Print the loss of the first and of the last step."""
    lightning.seed_everything(0, verbose=False)
    rows = TensorDataset(torch.tensor([[BOS_ID, *b"every row is a document"]] * 32))
    shape = ModelConfig(byte_dim=64, core_dim=64, core_ff=128, decoder_ff=128, context=128)
    module = ByteModule(shape)
    trainer = lightning.Trainer(
        max_epochs=5,
        accelerator="cpu",  # "auto" on a machine with a GPU
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(rows, batch_size=4))
    print(f"loss: {module.losses[0]:.2f} nats, then {module.losses[-1]:.2f}")


if __name__ == "__main__":
    main()
