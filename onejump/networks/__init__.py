"""Networks F: each an nn.Module called as `net(x, c_noise, c_noise_s, cond, key)`, built by a frozen dataclass."""

from onejump.networks.mlp import MLPConfig
from onejump.networks.song_unet import SongUNetConfig

__all__ = ["MLPConfig", "SongUNetConfig"]
