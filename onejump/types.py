"""Names for what travels between files. Times are noise levels: t is sigma, and x_t = x0 + t * eps."""

from jaxtyping import Float, Int64, UInt8
from torch import Tensor

Samples = Float[Tensor, "b ..."]  # images or latents, in units of the data ([-1, 1] for images)
Times = Float[Tensor, " b"]  # one noise level a sample, float32
PerSample = Float[Tensor, " b"]  # one number a sample: a distance, a weight, a coefficient
Grid = Float[Tensor, " n"]  # an ascending grid of times, float64
Images = UInt8[Tensor, "n c h w"]  # images at rest
Features = Float[Tensor, "n d"]  # a detector's features, one row an image
DropoutKey = Int64[Tensor, " b"] | None  # one key a sample: equal keys, equal dropout masks
Cond = Tensor | None  # whatever the network wants: int64 [b] class labels, float vectors, text embeddings


class UserError(ValueError):
    """A user's mistake. Its message is one line that names the field, file or value and the way out."""


def beside(values: Tensor, x: Tensor) -> Tensor:
    """Times, indices and weights, which methods hold on the CPU, on the device of x, which is not waited for."""
    if values.device == x.device:
        return values
    values = values.pin_memory() if x.device.type == "cuda" else values
    return values.to(x.device, non_blocking=True)
