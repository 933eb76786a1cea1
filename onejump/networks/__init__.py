"""Networks F: each an nn.Module called as `net(x, c_noise, c_noise_s, cond, key)`, built by a frozen dataclass.

Critics are called as `critic(x)`.
"""

from onejump.networks.adm_unet import ADMUNetConfig
from onejump.networks.critic import ProjectedCriticConfig, SmallCriticConfig, TimmFeatures
from onejump.networks.mlp import MLPConfig
from onejump.networks.song_unet import SongUNetConfig

__all__ = ["ADMUNetConfig", "MLPConfig", "ProjectedCriticConfig", "SmallCriticConfig", "SongUNetConfig", "TimmFeatures"]
