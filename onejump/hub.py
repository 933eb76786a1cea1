"""Saved models as the Hugging Face Hub has them: from_pretrained, save_pretrained, push_to_hub. Extra `hub`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from onejump.generate import balanced_labels, generate
from onejump.saved import CONFIG, WEIGHTS, SavedModel, licence_on_hub, load_model, save_model, usual_steps
from onejump.types import Images, UserError

try:
    from huggingface_hub import ModelCardData, ModelHubMixin, snapshot_download
except ImportError as error:
    raise ImportError("onejump.hub needs huggingface_hub: pip install 'onejump[hub]'") from error

CARD = "README.md"
ORIGIN = ("recipe", "stage", "step", "data", "kind", "imported_from", "source_sha256", "training method")


class Generator(nn.Module, ModelHubMixin):
    """Images from a saved model; its folder on disk and on the Hub is save_model's, with a model card.

    from_pretrained(id, revision=, cache_dir=, token=, local_files_only=, force_download=), save_pretrained(folder) and
    push_to_hub(id, ...) are as huggingface_hub has them. In place of the id a model's folder, a run's, or a single file
    needs no network.
    """

    _hub_mixin_config: dict[str, Any] | None = {}  # config.json is ours: the mixin has nothing to gather for it

    def __init__(self, saved: SavedModel):
        super().__init__()
        self.saved = saved
        self.model = saved.model

    def generate(
        self, n: int, steps: int = 1, labels: Sequence[int] | Tensor | None = None, seed: int = 0, batch: int = 256
    ) -> Images:
        """Images 0 to n - 1 of this seed by the stored sampler, uint8 [n, c, h, w] on the CPU.

        labels: a class for each; without them a model with classes makes all in turn. Raises UserError for labels that
        the model does not know, and for a number of steps that its sampler does not.
        """
        classes = self.saved.network.label_dim
        if n < 1:
            raise UserError(f"n: {n}; at least one image")
        asked = balanced_labels(n, classes) if labels is None else torch.as_tensor(labels, dtype=torch.int64).cpu()
        if labels is not None and not classes:
            raise UserError("labels: this model was trained without classes; leave them out")
        if asked is not None and asked.shape != (n,):
            raise UserError(f"labels: {tuple(asked.shape)} for {n} images; one for each is needed")
        if asked is not None and not 0 <= int(asked.min()) <= int(asked.max()) < classes:
            raise UserError(f"labels: {int(asked.min())} to {int(asked.max())}; this model has 0 to {classes - 1}")
        return generate(self.model, self.saved.sampler, steps, range(n), self.saved.shape, asked, seed, batch)

    def _save_pretrained(self, save_directory: Path) -> None:
        save_model(save_directory, self.saved)
        if not (save_directory / CARD).exists():
            (save_directory / CARD).write_text(model_card(self.saved))

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        force_download: bool = False,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        revision: str | None = None,
        **unknown: Any,
    ) -> "Generator":
        """What is on this machine under that name, else that repository of the Hub. Raises UserError for no model.

        The mixin's own would look for a config.json first, which a run's folder and a single file do not have.
        """
        if unknown:
            raise UserError(f"{next(iter(unknown))}: from_pretrained has no such option")
        if Path(pretrained_model_name_or_path).exists():
            return cls(load_model(pretrained_model_name_or_path))
        folder = snapshot_download(
            str(pretrained_model_name_or_path),
            revision=revision,
            cache_dir=cache_dir,
            force_download=force_download,
            local_files_only=local_files_only,
            token=token,
            allow_patterns=[CONFIG, WEIGHTS],
        )
        return cls(load_model(folder))


def model_card(saved: SavedModel) -> str:
    """README.md of a model's repository: what the Hub reads, what the model is, and how to sample from it."""
    sampler, steps = saved.sampler, usual_steps(saved.sampler)
    parameters = sum(p.numel() for p in saved.model.net.parameters())
    times = ", ".join(f"{t:.4g}" for t in sampler.times(steps))
    facts = {
        "images": "x".join(map(str, saved.shape)),
        "classes": str(saved.network.label_dim or "none"),
        "network": f"{type(saved.network).__name__.removesuffix('Config')}, {parameters:,} parameters",
        "sampler": f"{type(sampler).__name__}; with {steps} step{'s' * (steps > 1)} from t = {times}",
        "smallest time": f"t' = {saved.model.t_min:g}" if saved.model.t_min else "any",
        "average of the weights": saved.ema or "not stated",
        "licence of the weights": saved.licence or "not stated",
    }
    facts |= {key.replace("_", " "): str(saved.provenance[key]) for key in ORIGIN if key in saved.provenance}
    made = "Imported" if "imported_from" in saved.provenance else "Made"
    rows = "".join(f"| {name} | {_cell(text)} |\n" for name, text in facts.items())
    return f"""---
{_card_data(saved).to_yaml()}
---

# A generator of images

{made} with onejump. `pip install 'onejump[hub]'`, then, with the name of this repository or a folder's path:

```python
from onejump.hub import Generator
generator = Generator.from_pretrained("USER/NAME")
images = generator.generate(16, steps={steps})  # uint8 [16, {", ".join(map(str, saved.shape))}]
```

| | |
|---|---|
{rows}"""


def _card_data(saved: SavedModel) -> ModelCardData:
    licence = licence_on_hub(saved.licence)
    return ModelCardData(
        library_name="onejump",
        license=licence.get("license"),
        license_name=licence.get("license_name"),
        pipeline_tag="unconditional-image-generation",
        tags=["consistency-model", "image-generation", "onejump"],
    )


def _cell(text: str) -> str:
    """Text on one line of a table."""
    return " ".join(text.replace("|", "\\|").split())
