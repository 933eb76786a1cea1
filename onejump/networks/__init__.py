"""Networks F: each an nn.Module called as `net(x, c_noise, c_noise_s, cond, key)`, built by a frozen dataclass.

Sizes that papers name are in the docstrings of the configurations: CIFAR-10's DDPM++ in SongUNetConfig, ImageNet's
ADM in ADMUNetConfig, EDM2's XS to XXL and TCM's edm2-cifar-s and -m in EDM2UNetConfig. Critics are called as
`critic(x)`.
"""

from onejump.networks.adm_unet import ADMUNetConfig
from onejump.networks.critic import ProjectedCriticConfig, SmallCriticConfig, TimmFeatures
from onejump.networks.edm2_unet import EDM2UNetConfig
from onejump.networks.magnitude import normalize_weights, normalized
from onejump.networks.mlp import MLPConfig
from onejump.networks.song_unet import SongUNetConfig

__all__ = [
    "ADMUNetConfig",
    "EDM2UNetConfig",
    "MLPConfig",
    "ProjectedCriticConfig",
    "SmallCriticConfig",
    "SongUNetConfig",
    "TimmFeatures",
    "normalize_weights",
    "normalized",
]
