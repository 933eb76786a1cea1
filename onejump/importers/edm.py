"""Pickles of EDM, EDM2, ECT and TCM, and ECT's and TCM's training states: networks inside a preconditioning class."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from onejump.importers.arguments import Arguments, shown
from onejump.importers.imported import Imported, check_filters, first, fitting, precision, tensor_names, understood
from onejump.importers.inert import printable
from onejump.importers.module_record import ModuleRecord
from onejump.importers.published import average_of
from onejump.importers.use import SHIFT, Given, Known, Use, decided, one_step, use_of
from onejump.networks.adm_unet import ADMUNetConfig
from onejump.networks.edm2_unet import EDM2UNetConfig
from onejump.networks.song_unet import SongUNetConfig, Variant
from onejump.networks.unet_parts import MAX_BLOCKS
from onejump.precond import EDM
from onejump.types import UserError

PRECONDS = ("EDMPrecond", "ECMPrecond", "Precond")  # EDM's, ECT's and TCM's, EDM2's and ECT's on ImageNet
OTHERS = ("VPPrecond", "VEPrecond", "iDDPMPrecond")
POSITIONS = ("img_resolution", "img_channels", "label_dim")  # of arguments without a name
VARIANTS: tuple[tuple[tuple[object, ...], Variant], ...] = (
    (("positional", "standard", 1, (1, 1)), "ddpmpp"),
    (("fourier", "residual", 2, (1, 3, 3, 1)), "ncsnpp"),
)
LOGVAR = "of the loss's weighting in EDM2's training; sampling does not need it"
REASONS = {
    "optimizer_state": "of the optimizer",
    "gradscaler_state": "of the optimizer",
    "ema_state": "averages beside the network that was asked for",
    "online_ema_state": "averages beside the network that was asked for",
    "loss_fn": "of the loss",
    "augment_pipe": "of the augmentation",
    "encoder": "not of the network",
}


def read_pickle(path: Path, content: Mapping[str, object], given: Given) -> Imported:
    """A file whose content has a network at "ema" (a snapshot) or "net" (a training state)."""
    given.only(path, "EDM's family", "method", "t_min")
    key = "ema" if "ema" in content else "net"
    record = content[key]
    assert isinstance(record, ModuleRecord)
    if record.class_name not in PRECONDS:
        why = "its preconditioning is another" if record.class_name in OTHERS else "no class of EDM, EDM2, ECT, TCM"
        known = ", ".join(PRECONDS)
        raise UserError(f"{path}: {printable(record.class_name)} ({why}); only {known} can be imported")
    if len(record.init_args) > len(POSITIONS):
        raise UserError(f"{path}: {record.class_name} was made with arguments without a name; only three are known")
    named = dict(zip(POSITIONS, record.init_args, strict=False)) | record.init_kwargs
    arguments = Arguments(path, record.class_name, named)
    network, precond = network_of(arguments, record.class_name)
    tensors, dropped = own_tensors(path, record, network)
    for name, value in content.items():
        if name != key:
            reason = REASONS.get(name, "not of the network")
            dropped |= {tensor: reason for tensor in tensor_names(value, name)}
    use = use_in(path, content, given, network, precond, "logvar_linear.weight" in dropped)
    ema, average = average_of(path)
    if key == "net":
        ema, average = "", {"average": "none: the network as it is trained"}
    return understood(
        kind=kind_of(record, content),
        network=network,
        weights=fitting(path, tensors, network),
        dropped=dropped,
        use=use,
        precond=precond,
        ema=ema,
        facts=average | precision(tensors.values()) | encoder_of(content),
    )


def network_of(arguments: Arguments, class_name: str) -> tuple[Known, EDM]:
    """Our configuration of the network that a preconditioning class was made with, and its sigma_data."""
    arguments.ignore("use_fp16", "sigma_min", "sigma_max", "logvar_channels", "class_name")
    precond = EDM(arguments.number("sigma_data", 0.5))
    shape = arguments.whole("img_resolution"), arguments.whole("img_channels"), arguments.whole("label_dim", 0, 0)
    models = ("EDM2UNet",) if class_name == "Precond" else ("DhariwalUNet", "SongUNet", "EDM2UNet")
    model = arguments.must_be("model_type", *models)
    network: Known
    if model == "EDM2UNet":
        network = edm2_unet(arguments, *shape)
    else:
        arguments.must_be("channel_mult_emb", 4)
        arguments.must_be("label_dropout", 0)
        network = song_unet(arguments, *shape) if model == "SongUNet" else adm_unet(arguments, *shape)
    arguments.done()
    return network, precond


def song_unet(arguments: Arguments, resolution: int, channels: int, classes: int) -> SongUNetConfig:
    kinds = {
        "embedding_type": arguments.left.pop("embedding_type", "positional"),
        "encoder_type": arguments.left.pop("encoder_type", "standard"),
        "channel_mult_noise": arguments.left.pop("channel_mult_noise", 1),
        "resample_filter": arguments.wholes("resample_filter", (1, 1)),
    }
    variant = next((variant for kind, variant in VARIANTS if kind == tuple(kinds.values())), None)
    if variant is None:
        text = ", ".join(f"{name}={shown(value)}" for name, value in kinds.items())
        raise UserError(f"{arguments.path}: SongUNet with {text}; only DDPM++ and NCSN++ as EDM has them are known")
    arguments.must_be("decoder_type", "standard")
    arguments.must_be("attn_type", "dot")
    arguments.must_be("learnable_scale", False)
    arguments.must_be("emb_norm", False)
    mult = arguments.levels((1, 2, 2, 2))
    return SongUNetConfig(
        resolution,
        channels,
        classes,
        arguments.whole("model_channels", 128),
        mult,
        arguments.whole("num_blocks", 4, at_most=MAX_BLOCKS),
        attention(arguments, resolution, mult, (16,)),
        arguments.number("dropout", 0.1),
        variant=variant,
        fourier_scale=arguments.number("scale", 16.0),
        augment_dim=arguments.whole("augment_dim", 0, 0),
    )


def adm_unet(arguments: Arguments, resolution: int, channels: int, classes: int) -> ADMUNetConfig:
    mult = arguments.levels((1, 2, 3, 4))
    return ADMUNetConfig(
        resolution,
        channels,
        classes,
        arguments.whole("model_channels", 192),
        mult,
        arguments.whole("num_blocks", 3, at_most=MAX_BLOCKS),
        attention(arguments, resolution, mult, (32, 16, 8)),
        arguments.number("dropout", 0.1),
        augment_dim=arguments.whole("augment_dim", 0, 0),
    )


def edm2_unet(arguments: Arguments, resolution: int, channels: int, classes: int) -> EDM2UNetConfig:
    mult = arguments.levels((1, 2, 3, 4))
    arguments.must_be("channel_mult_noise", None, mult[0])
    arguments.must_be("channel_mult_emb", None, max(mult))
    for name in ("label_balance", "concat_balance"):
        arguments.must_be(name, 0.5)
    for name in ("res_balance", "attn_balance"):
        arguments.must_be(name, 0.3)
    arguments.must_be("clip_act", 256)
    arguments.must_be("resample_filter", [1, 1], (1, 1))
    arguments.must_be("emb_norm", False)
    arguments.must_be("learnable_scale", False)
    arguments.ignore("scale")  # of the Fourier frequencies, which the file holds
    return EDM2UNetConfig(
        resolution,
        channels,
        classes,
        arguments.whole("model_channels", 192),
        mult,
        arguments.whole("num_blocks", 3, at_most=MAX_BLOCKS),
        attention(arguments, resolution, mult, (16, 8)),
        arguments.whole("channels_per_head", 64),
        arguments.number("dropout", 0.0),
        dropout_resolution(arguments, resolution, mult),
    )


def attention(
    arguments: Arguments, resolution: int, mult: tuple[int, ...], default: tuple[int, ...]
) -> tuple[int, ...]:
    """attn_resolutions, less those that this network does not have."""
    asked = arguments.wholes("attn_resolutions", default)
    return tuple(dict.fromkeys(side for side in asked if side in sides_of(resolution, mult)))


def sides_of(resolution: int, mult: tuple[int, ...]) -> list[int]:
    return [resolution >> level for level in range(len(mult))]


def dropout_resolution(arguments: Arguments, resolution: int, mult: tuple[int, ...]) -> int:
    """EDM2 has dropout at every resolution, ECT up to dropout_res, TCM at the resolutions that it lists."""
    highest = arguments.left.pop("dropout_res", None)
    listed = arguments.left.pop("dout_resolutions", None)
    sides = sides_of(resolution, mult)
    if isinstance(listed, list | tuple):
        with_dropout = [side for side in sides if side in listed]
        highest = max(with_dropout, default=0)
        if not highest or with_dropout != [side for side in sides if side <= highest]:
            raise arguments.refusal("dout_resolutions", listed, "only all resolutions up to one of them are possible")
    if isinstance(highest, float) and highest.is_integer():  # 16.0, as a command line's float
        highest = int(highest)
    if highest is not None and not (type(highest) is int and 0 <= highest <= resolution):
        raise arguments.refusal("dropout_res", highest, "a resolution is needed")
    return max((side for side in sides if side <= highest), default=0) if highest else 0


def own_tensors(path: Path, record: ModuleRecord, network: Known) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(the network's tensors by our names, those of its wrapper that are dropped)."""
    prefix = "unet." if record.class_name == "Precond" else "model."
    tensors = record.state_dict()
    ours = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    dropped = {name: LOGVAR for name in tensors if name.startswith("logvar_")}
    strangers = [name for name in tensors if not name.startswith(prefix) and name not in dropped]
    if strangers:
        raise UserError(f"{path}: {record.class_name} holds {first(strangers)}, which has no place in our network")
    check_filters(path, ours, network)
    return ours, dropped


def use_in(path: Path, content: Mapping[str, object], given: Given, network: Known, precond: EDM, logvar: bool) -> Use:
    """By the class, and by what the loss of training left in the file."""
    loss, record = content.get("loss_fn"), content.get("ema", content.get("net"))
    held = loss.attributes if isinstance(loss, ModuleRecord) else {}
    kind = record.class_name if isinstance(record, ModuleRecord) else ""
    if kind == "EDMPrecond" or (kind == "Precond" and logvar):
        return use_of("edm", f"its class is {kind}" + ", with EDM2's logvar" * logvar, network, precond, given)
    if kind == "Precond":
        method, how = decided(path, given, None)
        how = how if method else "EDM2's network without its logvar head, as ECT trains it"
        return use_of(method or "ect", how, network, precond, given)
    if "t_lower" in held:
        lower = time_in(path, "ECMLoss", "t_lower", held, 0.002)
        stage, known = (2, lower) if lower > 0.002 else (1, 0.0)
        method, how = decided(path, given, "tcm", f"stage {stage}: its loss_fn has t_lower={lower:g}")
        return use_of(str(method), how, network, precond, given, t_min=known)
    content_says = "ect" if "q" in held else None
    because = "its loss_fn is ECT's, without TCM's t_lower"
    made_with = record.init_kwargs if isinstance(record, ModuleRecord) else {}
    if not content_says and (tells := tcm_alone(content, made_with, network)):
        content_says, because = "tcm", tells
    method, how = decided(path, given, content_says, because)
    if method is None:
        return one_step(path, given, "the file holds no loss_fn, so ECT or TCM")
    shift = time_in(path, kind, "sigma_min", made_with, SHIFT)
    return use_of(method, how, network, precond, given, shift=shift)


def tcm_alone(content: Mapping[str, object], made_with: Mapping[str, object], network: Known) -> str:
    """What in a file without a loss_fn only TCM writes, "" if nothing."""
    if "resume_tick" in content:
        return "its training state has resume_tick, which ECT's has not"
    if made_with.get("dout_resolutions") is not None:
        return "its network was made with dout_resolutions, which ECT's was not"
    return "EDM2's network inside ECMPrecond" if isinstance(network, EDM2UNetConfig) else ""


def time_in(path: Path, of: str, name: str, held: Mapping[str, object], default: float) -> float:
    """A time of 0 or more below the largest. Raises UserError for any other."""
    values = {name: held[name]} if name in held else {}
    time = Arguments(path, of, values).number(name, default)
    if not 0 <= time < 80:
        raise UserError(f"{path}: {of} has {name}={time:g}; a time of 0 or more and below 80 is needed")
    return time


def kind_of(record: ModuleRecord, content: Mapping[str, object]) -> str:
    name = {"EDMPrecond": "EDM", "ECMPrecond": "ECT or TCM", "Precond": "EDM2"}[record.class_name]
    return f"{name} {'pickle' if 'ema' in content else 'training state'} ({record.class_name})"


def encoder_of(content: Mapping[str, object]) -> dict[str, str]:
    encoder = content.get("encoder")
    if not isinstance(encoder, ModuleRecord) or encoder.class_name == "StandardRGBEncoder":
        return {}
    return {"encoder": f"{printable(encoder.class_name)}, not imported: the network makes latents, not images"}
