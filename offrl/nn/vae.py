"""Conditional variational autoencoder of actions (Sohn et al., 2015; as in BCQ, Fujimoto et al., 2019)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from offrl.nn.layers import MLP

LOG_STD_MIN, LOG_STD_MAX = -4.0, 15.0
PRIOR_CLIP = 0.5


class ActionVAE(nn.Module):
    """q(z | s, a) and p(a | s, z), with `latent` dimensions of z; actions lie in [-1, 1].

    forward(obs, action, noise) encodes and decodes: (reconstruction (B, action), mean (B, latent), std (B, latent)).
    forward(obs, None, noise) decodes a sample of the prior, clipped to half a standard deviation: (B, action).
    noise (B, latent) is standard normal.
    """

    def __init__(self, obs: int, action: int, hidden: Sequence[int], latent: int):
        super().__init__()
        self.encoder = MLP((obs + action, *hidden, 2 * latent))
        self.decoder = MLP((obs + latent, *hidden, action))

    def forward(self, obs: Tensor, action: Tensor | None, noise: Tensor):
        if action is None:
            return self.decode(obs, noise.clamp(-PRIOR_CLIP, PRIOR_CLIP))
        mean, log_std = self.encoder(torch.cat([obs, action], -1)).chunk(2, -1)
        std = log_std.clamp(LOG_STD_MIN, LOG_STD_MAX).exp()
        return self.decode(obs, mean + std * noise), mean, std

    def decode(self, obs: Tensor, latent: Tensor) -> Tensor:
        return torch.tanh(self.decoder(torch.cat([obs, latent], -1)))
