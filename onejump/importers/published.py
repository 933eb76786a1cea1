"""What a file's exact name tells where its content does not: which average it holds, and of a few files the method.

A renamed copy is a file of which nothing is known; a part of a name is at most worth a remark. The names are those of

    openai/consistency_models           README.md (files), cm/train_util.py (ema_RATE_STEP.pt)
    openai/consistency_models_cifar10   README.md (edm_cifar10_ema)
    openai/diffusers-NAME               on the Hugging Face Hub, the same models as folders
    NVlabs/edm2                         README.md and reconstruct_phema.py (PREFIX-KIMG-STD.pkl)
    locuslab/ect                        its branch for ImageNet, training loop (network-snapshot-KIMG-STD.pkl)
"""

import re
from pathlib import Path

from onejump.times import karras_grid

# OpenAI's consistency models, and of how many times which one, counted from the largest, starts the published second
# step: --ts and --steps in scripts/launch.sh of openai/consistency_models, which has none for the last two.
CONSISTENCY: dict[str, tuple[int, int] | None] = {
    "cd_imagenet64_l2": (22, 40),
    "cd_imagenet64_lpips": (22, 40),
    "ct_imagenet64": (106, 201),
    "cd_bedroom256_l2": (18, 40),
    "cd_bedroom256_lpips": (17, 40),
    "ct_bedroom256": (67, 151),
    "ct_cat256": (62, 151),
    "cd_cat256_l2": None,
    "cd_cat256_lpips": None,
}
TEACHERS = ("edm_imagenet64_ema.pt", "edm_bedroom256_ema.pt", "edm_cat256_ema.pt", "edm_cifar10_ema")
POWER = re.compile(r"(edm2-img\d+-(xs|s|m|l|xl|xxl)|network-snapshot|phema)-\d{7}-(?P<std>0\.\d{3})\.pkl")
CONSTANT = re.compile(r"ema_(?P<rate>0\.\d+)_\d{6}\.pt")
WORDS = {"cd": "cm", "ct": "cm", "cm": "cm", "ecm": "ect"} | {
    name: name for name in ("edm", "ctm", "ict", "ect", "tcm")
}


def method_of(path: Path) -> str | None:
    """Of a file with the whole name of one that OpenAI publishes."""
    if path.suffix == ".pt" and path.stem in CONSISTENCY:
        return "cm"
    return "edm" if path.name in TEACHERS else None


def second_time(name: str) -> float | None:
    """Where the published second step of one of CONSISTENCY starts."""
    place = CONSISTENCY.get(name)
    if place is None:
        return None
    index, levels = place
    return round(float(karras_grid(levels, 0.002, 80.0, 7.0).flip(0)[index]), 4)


def average_of(path: Path) -> tuple[str, dict[str, str]]:
    """(the average of the weights, "" if the name does not tell; what is printed about it)."""
    source = f"by the file's name, {path.name}"
    if found := POWER.fullmatch(path.name):
        return f"power sigma_rel {float(found['std']):g}", {"average": source}
    if found := CONSTANT.fullmatch(path.name):
        return f"constant {found['rate']}", {"average": source}
    return "", {"average": f"{source}, one of unknown length"} if path.name in TEACHERS else {}


def remark(path: Path) -> str:
    """What a part of the name suggests, for the user to decide; "" if nothing."""
    words = re.split(r"[^a-z0-9]+", path.name.lower())
    found = {WORDS[word] for word in words if word in WORDS}
    return f" (--method {found.pop()} if its name, {path.name}, is right)" if len(found) == 1 else ""
