"""Every published format: a file of its layout, imported, saved and loaded as ours, gives the published numbers."""

import foreign_files
import numpy as np
import pytest
import torch
from golden_data import f32, golden
from published_files import (
    DDPMPP,
    LABELS,
    NCSNPP,
    SMALLEST,
    TINY_EDM2,
    TINY_SONG,
    ECTLoss,
    jax_checkpoint,
    module,
    recipe,
    recipe_of_jax,
    shapes,
    smallest,
    snapshot,
    tcm_loss,
    weights,
)

from onejump.importers import import_model
from onejump.precond import CM, Euler, ToData
from onejump.samplers import ODE, Multistep, Trajectory
from onejump.saved import load_model

NUMBERS = golden("imports")
EDM2_NUMBERS, OPENAI, JAX = golden("edm2_unet"), golden("openai_unet"), golden("ncsnpp_jax")


def back(found, tmp_path):
    """Saved as ours and loaded."""
    found.save(tmp_path / "ours.safetensors")
    saved = load_model(tmp_path / "ours.safetensors")
    assert saved.network == found.network and saved.sampler == found.sampler
    assert saved.ema == found.ema and saved.licence == found.licence and saved.model.t_min == found.t_min
    return saved.model


def close(ours, published):
    published = f32(published)
    error = (ours - published).abs().max() / published.abs().max()
    assert error < 1e-5, error


def inner(case):
    return {f"model.{name}": recipe(name, shape) for name, shape in shapes(case).items()}


def noisy(case):
    return f32(NUMBERS[f"{case}/in/x_noisy"]), f32(NUMBERS[f"{case}/in/sigma"])


@pytest.mark.parametrize("case, kind", [("ddpmpp_labels", DDPMPP), ("ncsnpp", NCSNPP)])
def test_edm_pickle(tmp_path, case, kind):
    found = import_model(snapshot(tmp_path / "net.pkl", inner(case), "EDMPrecond", TINY_SONG | kind | LABELS))
    assert found.jump == ToData() and isinstance(found.sampler, ODE) and found.dropped
    assert len(found.class_names) == 10 and found.network.augment_dim == 9
    labels = torch.cat([f32(NUMBERS[f"{case}/in/{name}"]) for name in ("labels", "augment_labels")], 1)
    close(back(found, tmp_path)(*noisy(case), cond=labels), NUMBERS[f"{case}/out/EDMPrecond"])


def test_ect_pickle_is_used_as_ect_evaluates(tmp_path):
    """ECT's CIFAR-10 code shifts c_skip and c_out by 0.003 from the boundary: exactly the jump of CM from 0.003."""
    found = import_model(snapshot(tmp_path / "net.pkl", inner("ddpmpp"), "ECMPrecond", TINY_SONG | DDPMPP, ECTLoss()))
    assert found.jump == CM(0.003) and found.sampler == Multistep(80.0, (0.821,)) and not found.t_min
    assert found.facts["training method"].startswith("ect")
    model = back(found, tmp_path)
    close(model(*noisy("ddpmpp")), NUMBERS["ddpmpp/out/ECT_ECMPrecond_eval"])
    close(model.denoise(*noisy("ddpmpp")), NUMBERS["ddpmpp/out/EDMPrecond"])


def test_tcm_pickle_of_stage_2_is_kept_above_its_smallest_time(tmp_path):
    path = snapshot(tmp_path / "net.pkl", inner("ddpmpp"), "ECMPrecond", TINY_SONG | DDPMPP, tcm_loss(1.0))
    found = import_model(path)
    assert (found.jump, found.t_min, found.sampler) == (ToData(), 1.0, Multistep(80.0, (1.0,)))
    assert "stage 2" in found.facts["training method"]
    close(back(found, tmp_path)(*noisy("ddpmpp")), NUMBERS["ddpmpp/out/TCM_ECMPrecond_eval"])


def test_tcm_pickle_of_stage_1_has_no_smallest_time(tmp_path):
    found = import_model(snapshot(tmp_path / "net.pkl", smallest(), "ECMPrecond", SMALLEST, tcm_loss(0.002)))
    assert (found.jump, found.t_min) == (ToData(), 0.0) and "stage 1" in found.facts["training method"]


def test_tcm_pickle_of_edm2s_network(tmp_path):
    arguments = TINY_EDM2 | {"model_type": "EDM2UNet", "dropout": 0.4, "dout_resolutions": [16, 8, 4, 2, 1]}
    found = import_model(snapshot(tmp_path / "net.pkl", weights("tcm"), "ECMPrecond", arguments, tcm_loss(1.0)))
    assert found.network.dropout_resolution == 16 and found.network.dropout == 0.4
    x, t, labels = (f32(EDM2_NUMBERS[f"tcm/in/{name}"]) for name in ("x_noisy", "sigma", "labels"))
    close(back(found, tmp_path)(x, t, cond=labels), EDM2_NUMBERS["tcm/out/precond_eval_f32"])


def test_edm2_pickle(tmp_path):
    """EDM2's pickles are an EasyDict with the encoder beside the network, and name the length of the average."""
    content = {"ema": module(weights("edm2"), "Precond", TINY_EDM2 | {"use_fp16": True, "logvar_channels": 128})}
    encoder = foreign_files.PersistentObject("StandardRGBEncoder")
    path = tmp_path / "edm2-img64-s-1073741-0.075.pkl"
    foreign_files.write_pickle(path, foreign_files.EasyDict(content | {"encoder": encoder}))
    found = import_model(path)
    assert found.ema == "power sigma_rel 0.075" and isinstance(found.sampler, ODE)
    assert {"logvar_fourier.freqs", "logvar_fourier.phases", "logvar_linear.weight"} <= found.dropped.keys()
    x, t, labels = (f32(EDM2_NUMBERS[f"edm2/in/{name}"]) for name in ("x_noisy", "sigma", "labels"))
    close(back(found, tmp_path)(x, t, cond=labels), EDM2_NUMBERS["edm2/out/precond_f32"])


def test_weights_in_half_precision_become_float32(tmp_path):
    halves = {name: w.half() for name, w in weights("edm2").items() if not name.startswith("logvar")}
    found = import_model(snapshot(tmp_path / "net.pkl", halves, "Precond", TINY_EDM2))
    assert found.facts["precision"].startswith("float16") and found.facts["training method"].startswith("ect")
    net = back(found, tmp_path).net.state_dict()
    assert all(w.dtype == torch.float32 for w in net.values())
    assert all(torch.equal(net[name.removeprefix("unet.")], w.float()) for name, w in halves.items())


@pytest.mark.parametrize("write", [foreign_files.write_zip, foreign_files.write_legacy])
def test_training_state_is_the_raw_network(tmp_path, write):
    net = module(inner("ddpmpp"), "ECMPrecond", TINY_SONG | DDPMPP)
    optimizer = {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-4, "params": [0]}]}
    path = write(tmp_path / "training-state-latest.pt", {"net": net, "optimizer_state": optimizer, "resume_tick": 7})
    found = import_model(path, method="tcm")
    assert (
        found.ema == ""
        and found.facts["average"].startswith("none")
        and found.dropped["optimizer_state.state.0.exp_avg"] == "of the optimizer"
    )
    assert found.t_min == 1 and "assumed" in found.facts["t_min"]
    close(back(found, tmp_path)(*noisy("ddpmpp")), NUMBERS["ddpmpp/out/TCM_ECMPrecond_eval"])


def test_state_dict_of_ncsnpp(tmp_path):
    """As TCM's ct_eval --save_pth writes it."""
    torch.save(inner("ncsnpp"), tmp_path / "model.pth")
    found = import_model(tmp_path / "model.pth", method="ect")
    labels = torch.cat([f32(NUMBERS[f"ncsnpp/in/{name}"]) for name in ("labels", "augment_labels")], 1)
    close(back(found, tmp_path)(*noisy("ncsnpp"), cond=labels), NUMBERS["ncsnpp/out/ECT_ECMPrecond_eval"])


def test_state_dict_of_edm2_needs_its_heads(tmp_path):
    torch.save(weights("tcm"), tmp_path / "edm2.pth")
    found = import_model(tmp_path / "edm2.pth", method="tcm", t_min=0.0, head_channels=16)
    assert found.t_min == 0 and "t_min" not in found.facts
    x, t, labels = (f32(EDM2_NUMBERS[f"tcm/in/{name}"]) for name in ("x_noisy", "sigma", "labels"))
    close(back(found, tmp_path)(x, t, cond=labels), EDM2_NUMBERS["tcm/out/precond_eval_f32"])


def by_openai(case):
    z = {key.removeprefix(f"{case}/"): value for key, value in OPENAI.items() if key.startswith(f"{case}/")}
    x, c_noise = f32(z["in/x"]), f32(z["in/timesteps"]) / 1000
    return x, c_noise, f32(z["in/s"]) / 1000 if "in/s" in z else None, torch.tensor(z["in/y"]) if "in/y" in z else None


def by_head(tensors, head):
    """The rows of qkv head by head, and 1-d convolutions: guided diffusion's layout of the same network."""

    def changed(name, w):
        if ".qkv." in name:
            w = w.view(3, -1, head, *w.shape[1:]).transpose(0, 1).reshape(w.shape)
        return w[..., 0] if ".qkv.w" in name or ".proj_out.w" in name else w

    return {name: changed(name, w) for name, w in tensors.items()}


@pytest.mark.parametrize("case, head", [("imagenet64", 32), ("lsun", 16)])
@pytest.mark.parametrize("layout", ["block", "heads"])
def test_openai_state_dict_in_both_layouts_of_qkv(tmp_path, case, head, layout):
    tensors = weights(case, OPENAI)
    torch.save(by_head(tensors, head) if layout == "heads" else tensors, tmp_path / "cm.pt")
    found = import_model(tmp_path / "cm.pt", "cm", qkv=layout if layout == "heads" else None, head_channels=head)
    assert found.jump == CM(0.002) and found.sampler == Multistep(80.0, ()) and found.network.img_resolution == 16
    model = back(found, tmp_path)
    close(model.net(*by_openai(case)), OPENAI[f"{case}/out/f32"])


def test_ctm_state_dict_of_openais_network(tmp_path):
    torch.save(weights("ctm", OPENAI), tmp_path / "ema_0.999_049000.pt")
    found = import_model(tmp_path / "ema_0.999_049000.pt", head_channels=32)
    assert found.jump == Euler() and isinstance(found.sampler, Trajectory) and found.ema == "constant 0.999"
    assert not found.network.label_at_s
    close(back(found, tmp_path).net(*by_openai("ctm")), OPENAI["ctm/out/f32"])


@pytest.mark.parametrize("case, numbers", [("ctm", "songunet_ctm"), ("ctm_ncsnpp", "songunet_ctm_ncsnpp")])
def test_ctm_state_dict_of_cifar10(tmp_path, case, numbers):
    torch.save(weights(case), tmp_path / "model.pt")
    found = import_model(tmp_path / "model.pt")
    assert found.jump == Euler() and isinstance(found.sampler, Trajectory)
    z = golden(numbers)
    x, t, s = (f32(z[f"in/{name}"]) for name in ("x", "rescaled_t", "rescaled_s"))
    close(back(found, tmp_path).net(x, t / 1000, s / 1000), z["out/F_t_s"])


@pytest.mark.parametrize("method, out", [("edm", "denoiser(EDM scalings)"), ("cm", "distiller(CM scalings)")])
def test_jax_checkpoint(tmp_path, method, out):
    arrays = {name: recipe_of_jax(name, tuple(map(int, shape.split("x")))) for name, shape in pairs(JAX)}
    path = jax_checkpoint(tmp_path / "checkpoint_80", arrays)
    found = import_model(path, method=method)
    assert found.ema == "constant 0.9999" and found.dropped["params/Dense_0/kernel"].startswith("not the average")
    assert "opt_state/0/count" in found.dropped and found.network.variant == "ncsnpp"
    x, t = f32(JAX["in/x_noisy_nhwc"]).permute(0, 3, 1, 2), f32(JAX["in/t"])
    close(back(found, tmp_path)(x, t), np.moveaxis(JAX[f"out/{out}"], 3, 1))
    path = jax_checkpoint(tmp_path / "checkpoint_74", arrays, target_params={"Dense_0": {"bias": np.zeros(1)}})
    assert import_model(path).facts["training method"].startswith("cm (it holds the target network")


def pairs(z):
    return zip(z["names"].tolist(), z["shapes"].tolist(), strict=True)
