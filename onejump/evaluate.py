"""How good a model's samples are: the numbers of evaluation.json."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from onejump.config_json import to_json
from onejump.data.image_set import ImageSet
from onejump.evaluation.reading import FEATURES, Reader
from onejump.evaluation.statistics import GaussianStatistics, frechet_distance
from onejump.generate import Rounding, balanced_labels, block_on
from onejump.judge import Judge, detector_for, same_classes, told
from onejump.parts import Denoised, Generated, Given, Job, Source, Workers
from onejump.prompts import Prompts
from onejump.reference import Tell
from onejump.samplers import Sampler
from onejump.saved import SavedModel
from onejump.types import Images, UserError

__all__ = ["How", "Judge", "detector_for", "evaluate", "evaluate_images"]
DENOISE = (1.0, 2.0, 3.0, 4.0)  # noise levels of the denoising FID


@dataclass(frozen=True)
class How:
    """How samples are made, beyond their model, number and seed.

    block, rounding: see `generate`. denoise: noise levels of the denoising FID. identity: the model's checksum, under
    which parts are kept. sampler: in place of the model's own. prompts: of a text-to-image model.
    """

    block: int | None = None
    rounding: Rounding = "round"
    denoise: tuple[float, ...] = DENOISE
    workers: Workers = Workers()
    identity: str = ""
    sampler: Sampler | None = None
    prompts: Prompts | None = None


def evaluate(
    judge: Judge, saved: SavedModel, steps: Sequence[int], n: int, seed: int, batch: int = 512, how: How | None = None
) -> dict[str, Any]:
    """{"steps": {"1": numbers, "2": numbers}} of n samples each, images 0 .. n - 1 of this seed.

    Classes are asked of a model that has some; whether they came is told where they are those of the real images. The
    same numbers whatever the batch, the threads and the processes, and after a resume. Raises UserError for metrics by
    class where the model knows other classes.
    """
    how = how or How()
    sampler = how.sampler or saved.sampler
    how = replace(how, sampler=sampler, block=how.block or block_on(next(saved.model.parameters()).device))
    labels, out = balanced_labels(n, len(saved.class_names)), {}
    known = same_classes(saved.class_names, judge.data.class_names)
    check_classes(judge, saved.class_names)
    denoising = _denoising(judge, saved, n, seed, batch, how) if "dfid" in judge.metrics else {}
    for k in steps:
        source = Generated(saved, sampler, k, labels, seed, batch, how.block, how.rounding, how.prompts)
        about = {"steps": k, "times": sampler.times(k), "sampler": to_json(sampler)}
        about |= how.prompts.about if how.prompts else {}
        numbers = measure(judge, source, n, f"{k} step{'s' if k > 1 else ''}", how, about, seed, labels, known)
        out[str(k)] = {**numbers, "times": sampler.times(k), "nfe": sampler.calls(k) * saved.model.passes, "seed": seed}
    return {"sampler": to_json(sampler), "block": how.block, "rounding": how.rounding, "steps": out, **denoising}


def check_classes(judge: Judge, class_names: tuple[str, ...]) -> None:
    """Raises UserError for metrics that ask for classes, where those of the samples are not those of the images."""
    known = same_classes(class_names, judge.data.class_names)
    if "dfid" in judge.metrics and class_names and not known:
        raise UserError("metrics: dfid denoises the images as the classes they are; the model knows other classes")
    if "per-class" in judge.metrics and not known:
        what = "have other classes" if class_names else "have none"
        raise UserError(f"metrics: per-class compares within the classes of the real images; the samples {what}")


def question_of(judge: Judge, how: How | None, about: dict[str, Any]) -> dict[str, Any]:
    """All that the numbers of a record depend on, as JSON, so that another evaluation can be told from a second one."""
    whole: dict[str, Any] = {**about, "metrics": sorted({"fid", *judge.metrics}), "data": None, "reference": None}
    whole |= {"detector": judge.detector.hash}
    if judge.data.n:
        whole["data"] = judge.data.fingerprint
    if judge.given:
        whole["reference"] = judge.given.file_sha256
    if how:
        whole |= {"model": how.identity, "sampler": to_json(how.sampler), "block": how.block, "rounding": how.rounding}
        whole |= {"denoise": list(how.denoise)} if "dfid" in judge.metrics else {}
        whole |= {"prompts": how.prompts.about} if how.prompts else {}
    return json.loads(json.dumps(whole))


def evaluate_images(judge: Judge, images: Images, labels: Tensor | None, workers: Workers) -> dict[str, Any]:
    """The numbers of images that are there already; labels: the classes that they are said to show."""
    how = How(workers=workers, identity=ImageSet("", images).fingerprint)
    return measure(judge, Given(images), len(images), "images", how, {}, 0, labels, labels is not None)


def measure(
    judge: Judge,
    source: Source,
    n: int,
    title: str,
    how: How,
    about: dict[str, Any],
    seed: int,
    labels: Tensor | None = None,
    known: bool = False,
) -> dict[str, Any]:
    """The numbers of n samples of a source, and the seconds that making them took, over all processes.

    Of several processes started from outside, all but the first do their share of the parts and know no numbers: {}.
    """
    seconds, scores = 0.0, torch.zeros((), dtype=torch.float64)

    def parts(tell: Tell) -> Iterator[dict[str, Tensor]]:
        nonlocal seconds, scores
        for part in job_of(judge.reader, source, n, how, about, seed).run(tell):
            seconds += part["seconds"].item()
            scores = scores + part["clip"].double().sum() if "clip" in part else scores
            yield part

    with told(title, judge.show) as tell:
        read = parts(tell)
        if how.workers.rank:
            assert not list(read)
            return {}
        found = {**judge.judged(read, labels if known else None), "seconds": seconds}
        return found | ({"clip_score": scores.item() / n} if how.prompts and how.prompts.clip else {})


def job_of(reader: Reader, source: Source, n: int, how: How, about: dict[str, Any], seed: int) -> Job:
    """All that a part depends on is in the name of the folder of its job."""
    whole = about | {"model": how.identity, "seed": seed, "block": how.block, "rounding": how.rounding}
    whole |= {"reader": list(reader.kinds), "detector": reader.detector.name, "sha256": reader.detector.hash}
    device = next(source.saved.model.parameters()).device.type if isinstance(source, Generated | Denoised) else ""
    return Job(source, reader, n, whole | {"device": device, "torch": torch.__version__}, how.workers)


def _denoising(judge: Judge, saved: SavedModel, n: int, seed: int, batch: int, how: How) -> dict[str, Any]:
    """Denoising FID (TCM's): of f(x0 + t eps, t) for real x0, by noise level; those below t' are left out."""
    data, found = judge.data, {}
    chosen = torch.randperm(data.n, generator=torch.Generator().manual_seed(0))[:n]
    images, labels = data.pick(chosen), data.labels[chosen] if saved.class_names and data.labels is not None else None
    for t in how.denoise:
        if t < saved.model.t_min:
            continue
        source = Denoised(saved, images, labels, t, seed, batch, how.block, how.rounding)
        about = {"t": t, "data": data.fingerprint}
        with told(f"denoised at {t:g}", judge.show) as tell:
            job = job_of(Reader(judge.detector), source, len(images), how, about, seed)
            features = (part[FEATURES] for part in job.run(tell))
            if how.workers.rank:
                assert not list(features)
            else:
                found[f"{t:g}"] = frechet_distance(GaussianStatistics.of_batches(features), judge.statistics)
    return {"denoising": {"n": len(images), "frechet": found}}
