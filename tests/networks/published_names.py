"""The published U-Nets that have other names for the weights of ours."""

from itertools import count

import torch

from onejump.networks.unet_parts import smoothing

# in OpenAI's residual block, attention block, and convolutions that resample -> in our block
OPENAI = {
    **{"in_layers.0": "norm0", "in_layers.2": "conv0", "emb_layers.1": "affine", "emb_layers_s.1": "affine_s"},
    **{"out_layers.0": "norm1", "out_layers.3": "conv1", "skip_connection": "skip", "op": "conv", "conv": "conv"},
    **{"norm": "norm2", "qkv": "qkv", "proj_out": "proj"},
}
# in the JAX network's residual block -> in our block
JAX = {
    **{"GroupNorm_0": "norm0", "Conv_0": "conv0", "Dense_0": "affine", "GroupNorm_1": "norm1", "Conv_1": "conv1"},
    **{"Conv_2": "skip"},
}


def openai_places(config):
    """Each of OpenAI's modules -> ours. One of their levels ends with the resampling with which our next one begins."""
    sides, n = config.resolutions, config.num_blocks
    places = {"time_embed.0": "map_layer0", "time_embed.2": "map_layer1", "out.0": "out_norm", "out.2": "out_conv"}
    places |= {"time_embed_s.0": "map_layer0_s", "time_embed_s.2": "map_layer1_s", "label_emb": "map_label"}
    encoder = [f"{s}x{s}_{part}" for s in sides for part in ("down", *(f"block{i}" for i in range(n)))]
    places |= {f"input_blocks.{i}.{part}": f"enc.{name}" for i, name in enumerate(encoder) for part in (0, 1)}
    places["input_blocks.0.0"] = f"enc.{sides[0]}x{sides[0]}_conv"
    bottom = f"dec.{sides[-1]}x{sides[-1]}"
    places |= {"middle_block.0": f"{bottom}_in0", "middle_block.1": f"{bottom}_in0", "middle_block.2": f"{bottom}_in1"}
    for i, (s, block) in enumerate((s, block) for s in reversed(sides) for block in range(n + 1)):
        places |= {f"output_blocks.{i}.{part}": f"dec.{s}x{s}_block{block}" for part in (0, 1)}
        if block == n and s != sides[0]:
            places[f"output_blocks.{i}.{2 if s in config.attn_resolutions else 1}"] = f"dec.{2 * s}x{2 * s}_up"
    return places


def name_of_openais(name, places):
    *module, leaf = name.split(".")
    for n in range(len(module), 0, -1):
        place, inner = ".".join(module[:n]), ".".join(module[n:])
        if place in places and (not inner or inner in OPENAI):
            return ".".join(filter(None, (places[place], OPENAI.get(inner), leaf)))
    raise KeyError(name)


def interleaved(rows):
    """qkv with rows [all q | all k | all v] -> q, k, v of channel 0, then of channel 1, ..."""
    return rows.view(3, len(rows) // 3, *rows.shape[1:]).transpose(0, 1).reshape(rows.shape)


def openai_to_ours(weights, config):
    """The state dict of config.build() with the weights of OpenAI's UNetModel."""
    places, ours = openai_places(config), {}
    for name, w in weights.items():
        w = w.T if name == "label_emb.weight" else interleaved(w) if ".qkv." in name else w
        ours[name_of_openais(name, places)] = w
    sides = config.resolutions if config.resample == "block" else ()
    resampled = (*(f"enc.{s}x{s}_down" for s in sides[1:]), *(f"dec.{s}x{s}_up" for s in sides[:-1]))
    return ours | {f"{name}.{c}.resample_filter": smoothing(1, 1) for name in resampled for c in ("conv0", "skip")}


def blocks(config):
    """(name, has attention) of every block in the order of construction."""
    sides, n = config.resolutions, config.num_blocks
    for s in sides:
        if s != sides[0]:
            yield f"enc.{s}x{s}_down", False
        yield from ((f"enc.{s}x{s}_block{i}", s in config.attn_resolutions) for i in range(n))
    yield from ((f"dec.{sides[-1]}x{sides[-1]}_in{i}", i == 0) for i in (0, 1))
    for s in reversed(sides):
        if s != sides[-1]:
            yield f"dec.{s}x{s}_up", False
        yield from ((f"dec.{s}x{s}_block{i}", i == n and s in config.attn_resolutions) for i in range(n + 1))


def jax_places(config):
    """Each flax module -> ours. Flax numbers the modules of a class in the order of construction."""
    sides, attentions = config.resolutions, count()
    side = f"{sides[0]}x{sides[0]}"
    places = {"Conv_0": f"enc.{side}_conv", "Conv_1": f"dec.{side}_aux_conv", "GroupNorm_0": f"dec.{side}_aux_norm"}
    places |= {"Dense_0": "map_layer0", "Dense_1": "map_layer1", "GaussianFourierProjection_0": "map_noise"}
    places |= {f"Downsample_{i}/Conv2d_0": f"enc.{s}x{s}_aux_residual" for i, s in enumerate(sides[1:])}
    for i, (name, attention) in enumerate(blocks(config)):
        places |= {f"ResnetBlockBigGANpp_{i}/{part}": f"{name}.{ours}" for part, ours in JAX.items()}
        if attention:
            theirs = f"AttnBlockpp_{next(attentions)}"
            places |= {f"{theirs}/GroupNorm_0": f"{name}.norm2", f"{theirs}/NIN_3": f"{name}.proj"}
            places |= {f"{theirs}/NIN_{j}": f"{name}.qkv.{j}" for j in range(3)}
    return places


def in_torchs_layout(path, w):
    """(leaf, tensor): flax has kernels [height, width, in, out] and [in, out]."""
    if path.startswith("GaussianFourierProjection"):
        return "freqs", w
    if w.ndim == 1:
        return "weight" if path.endswith("/scale") else "bias", w
    w = w.permute(*range(w.ndim - 1, w.ndim - 3, -1), *range(w.ndim - 2))
    return "weight", w[..., None, None] if path.endswith("/W") else w


def jax_to_ours(params, config):
    """The state dict of config.build() with the parameters of the JAX NCSN++."""
    places, ours = jax_places(config), {}
    for path, w in params.items():
        module, _, _ = path.rpartition("/")
        leaf, w = in_torchs_layout(path, w)
        ours[f"{places[module]}.{leaf}"] = w
    for name in [name for name in ours if ".qkv.0." in name]:
        q, k, v = (ours.pop(name.replace(".qkv.0.", f".qkv.{j}.")) for j in range(3))
        ours[name.replace(".qkv.0.", ".qkv.")] = interleaved(torch.cat([q, k, v]))
    filtered = [f"enc.{s}x{s}_aux_residual" for s in config.resolutions[1:]]
    for name in [name for name, _ in blocks(config) if name.endswith(("_down", "_up"))]:
        filtered += [f"{name}.conv0", f"{name}.skip"]
    return ours | {f"{name}.resample_filter": smoothing(1, 3, 3, 1) for name in filtered}
