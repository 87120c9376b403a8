"""Classification heads on the representation of the class token."""

import torch
from torch import Tensor, nn


class PreLogits(nn.Module):
    """The hidden tanh layer of the paper's pretraining head: (B, D) → (B, D). Dropped for fine-tuning."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc = nn.Linear(width, width)

    def forward(self, features_BD: Tensor) -> Tensor:
        return torch.tanh(self.fc(features_BD))
