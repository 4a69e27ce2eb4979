"""Put the modules into a model of your own: `python examples/drop_in_modules.py`.

The core between pooling and unpooling is plain PyTorch and knows nothing of bytes. Needs seconds on
a CPU and nothing beyond `pip install .`.
"""

import torch
from torch import Tensor, nn

from stlm_kernels.testing import assert_causal
from stlm_models import Attention, BytePatcher, BytePooling, ByteUnpooling, TiedEmbedding

DIM, STEPS = 64, 40


class YourModel(nn.Module):
    """Attention over bytes, a core over patches, and back, with one table for input and output."""

    def __init__(self, core: nn.Module) -> None:
        super().__init__()
        self.table = TiedEmbedding(256, DIM)
        self.encoder = Attention(DIM, heads=4, kv_heads=2, window=16)
        self.patcher = BytePatcher("space", max_patch_len=16)
        self.pool = BytePooling("attention", dim=DIM, heads=4)
        self.core = core
        self.unpool = ByteUnpooling(DIM)

    def forward(self, ids: Tensor) -> Tensor:
        """Return hidden states (B, T, DIM) of ids (B, T); each row is a document."""
        patches = self.patcher(ids)
        by_byte = self.encoder(self.table.embed(ids))
        by_patch = self.core(self.pool(by_byte, patches))  # (P, DIM), all rows' patches packed
        # A byte reads only patches that are complete at it: nothing of the future leaks.
        hidden: Tensor = self.unpool(by_patch, patches, residual=by_byte)
        return hidden


def main() -> None:
    """Print the loss of the first and of the last step, and prove that no byte sees a later one."""
    torch.manual_seed(0)
    core = nn.Sequential(nn.RMSNorm(DIM), nn.Linear(DIM, DIM), nn.SiLU(), nn.Linear(DIM, DIM))
    model = YourModel(core)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    ids = torch.tensor([list(b"two rows of bytes"), list(b"are two documents")])
    losses = []
    for _ in range(STEPS):
        hidden = model(ids)
        loss_sum, n_valid = model.table.loss(hidden[:, :-1], ids[:, 1:])  # no logits in memory
        loss = loss_sum / n_valid
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    print(f"loss: {losses[0]:.2f} nats, then {losses[-1]:.2f}")

    model.eval()
    with torch.no_grad():
        assert_causal(lambda row: model.table.logits(model(row[None]))[0], vocab_size=256)
    print("causal: no logit depends on a later byte")


if __name__ == "__main__":
    main()
