"""Our networks as a model of diffusers, and a pipeline that samples at the times a model was saved with.

The names that model_index.json and README.md of an exported folder give; diffusers has to be installed.
"""

from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d import UNet2DOutput
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.schedulers.scheduling_consistency_models import CMStochasticIterativeScheduler
from torch import Tensor, nn

from onejump.config_json import from_json
from onejump.data.image_set import to_uint8
from onejump.model import ConsistencyModel
from onejump.networks import ADMUNetConfig, EDM2UNetConfig, SongUNetConfig
from onejump.networks.diffusers_config import STORED
from onejump.networks.diffusers_weights import NOISE_SCALE
from onejump.precond import CM, EDM, ToData
from onejump.samplers import Multistep
from onejump.types import Cond, DropoutKey, Samples, Times, UserError


class OneJumpUNet(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """One of our networks, called as a UNet2DModel is. network: its configuration, as `to_json` writes it."""

    @register_to_config
    def __init__(
        self,
        network: dict[str, Any],
        sample_size: int,
        in_channels: int,
        out_channels: int,
        num_class_embeds: int | None = None,
    ):
        super().__init__()
        config = from_json(network)
        if not isinstance(config, SongUNetConfig | ADMUNetConfig | EDM2UNetConfig):
            raise UserError(f"network: {type(config).__name__}; a U-Net of onejump is needed")
        self.net = config.build()

    def forward(
        self,
        sample: Samples,
        timestep: Tensor | float,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DOutput | tuple[Tensor]:
        """F(c_in x; c_noise) for the sample c_in x and the timestep 1000 c_noise, one for all or one each."""
        c_noise = (torch.as_tensor(timestep) / NOISE_SCALE).float().to(sample.device).expand(len(sample))
        cond = None if class_labels is None else class_labels.long()
        F = self.net(sample, c_noise, None, cond)
        return UNet2DOutput(sample=F) if return_dict else (F,)


class UNetAsNetwork(nn.Module):
    """A unet of diffusers, called as our networks are, in its own precision."""

    def __init__(self, unet: ModelMixin):
        super().__init__()
        self.unet = unet

    def forward(
        self, x: Samples, c_noise: Times, c_noise_s: None = None, cond: Cond = None, key: DropoutKey = None
    ) -> Samples:
        return self.unet(x.to(self.unet.dtype), NOISE_SCALE * c_noise, class_labels=cond, return_dict=False)[0]


class OneJumpPipeline(DiffusionPipeline):
    """Samples an exported model at its own times, and no others; called as ConsistencyModelPipeline is."""

    model_cpu_offload_seq: Any = "unet"
    unet: ModelMixin
    scheduler: CMStochasticIterativeScheduler

    def __init__(self, unet: ModelMixin, scheduler: CMStochasticIterativeScheduler):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        num_inference_steps: int = 1,
        class_labels: Tensor | list[int] | int | None = None,
        generator: torch.Generator | None = None,
        noise: Tensor | None = None,
        output_type: str = "pil",
    ) -> ImagePipelineOutput:
        """noise: [steps, b, c, h, w], standard normal, one draw a step; drawn by the generator if not given.

        class_labels: for models with classes; drawn too if not given. output_type: pil, np ([b, h, w, c] in [0, 1]) or
        pt ([b, c, h, w] in [0, 1]). Raises UserError for steps of which the model has no times.
        """
        config, schedule = self.unet.config, self.scheduler.config
        stored = schedule.get(STORED)
        if stored is None:
            raise UserError(
                f"{self.config.get('_name_or_path')}: no times of its own; sample it by ConsistencyModelPipeline"
            )
        sampler = from_json(stored["sampler"])
        assert isinstance(sampler, Multistep)
        draws = len(sampler.times(num_inference_steps))
        device = self._execution_device
        if noise is None:
            shape = (draws, batch_size, config.in_channels, config.sample_size, config.sample_size)
            noise = torch.randn(shape, generator=generator, device=generator.device if generator else device)
        cond = None
        if config.num_class_embeds is not None:
            cond = self._labels(class_labels, noise.shape[1], config.num_class_embeds, generator).to(device)
        sigma_min, sigma_data = schedule["sigma_min"], schedule["sigma_data"]
        jump = CM(sigma_min, sigma_data) if sigma_min > 0 else ToData()
        model = ConsistencyModel(UNetAsNetwork(self.unet), EDM(sigma_data), jump, stored["t_min"])
        images = sampler(model, noise.to(device, torch.float32), num_inference_steps, cond)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=self._images(images, output_type))

    def _labels(self, given: Tensor | list[int] | int | None, n: int, classes: int, generator: Any) -> Tensor:
        if given is None:
            return torch.randint(classes, (n,), generator=generator, device=generator.device if generator else None)
        labels = torch.as_tensor(given).reshape(-1)
        if len(labels) not in (1, n) or not 0 <= int(labels.min()) <= int(labels.max()) < classes:
            raise UserError(f"class_labels: {given}; one or {n} of the {classes} classes from 0 up are needed")
        return labels.long().expand(n)

    def _images(self, images: Samples, output_type: str) -> Any:
        if output_type == "pil":
            return self.numpy_to_pil(to_uint8(images).permute(0, 2, 3, 1).cpu().numpy() / 255)
        if output_type not in ("np", "pt"):
            raise UserError(f"output_type: {output_type}; pil, np or pt is made")
        shares = (images / 2 + 0.5).clamp(0, 1)
        return shares if output_type == "pt" else shares.permute(0, 2, 3, 1).cpu().numpy()
