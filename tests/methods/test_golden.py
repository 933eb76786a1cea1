"""Losses and gradients of the published code, for its own draws of times and noise."""

import pytest
import torch
from golden_data import f32, f64, golden, sine_model

from onejump import losses
from onejump.methods.base import Nets, diffuse, on_rows
from onejump.methods.dsm import DSM
from onejump.methods.ect import ECT
from onejump.methods.tcm import TCM, Truncated
from onejump.times import Discretisation, LogNormal, LogStudentT


@pytest.mark.parametrize("c", [0.0, 0.06, 1e-8])
@pytest.mark.parametrize("stage", [0, 3, 8])
def test_ect_loss(draws, c, stage):
    data = golden("ect")
    draws(f32(data[f"stage{stage}/eps"]), data[f"stage{stage}/t"], LogNormal(-1.1, 2.0))
    method = ECT(delta=Discretisation(q=2, double_every=1), c=c)
    loss, stats = method.loss(method.nets(sine_model()), f32(data["images"]), None, stage, 100)
    expected = f32(data[f"stage{stage}/c{c}/loss"])
    weighted = losses.inverse_delta(stats["t"], f32(data[f"stage{stage}/r"])) * stats["distance"]
    # float32 throughout, as published: at stage 8 one ulp of r is 3e-5 of t - r
    rtol = 1e-6 if stage == 0 else 2e-6 if stage == 3 else 1e-4
    torch.testing.assert_close(loss, expected.mean(), rtol=rtol, atol=0)
    if stage < 8:
        torch.testing.assert_close(weighted, expected, rtol=rtol, atol=0)


@pytest.mark.parametrize("c", [0.0, 0.06, 1e-8])
@pytest.mark.parametrize("stage", [0, 3, 8])
def test_ect_loss_and_gradient_at_the_published_times(c, stage):
    data = golden("ect")
    x0, eps, t, r = (f32(data[k]) for k in ("images", f"stage{stage}/eps", f"stage{stage}/t", f"stage{stage}/r"))
    model = sine_model()
    ft = model(diffuse(x0, eps, t), t).detach().requires_grad_()
    with torch.no_grad():
        fr = on_rows(r > 0, model, diffuse(x0, eps, r), (r,), None, None)
    loss = losses.inverse_delta(t, r) * losses.pseudo_huber(ft, fr, c)
    loss.mean().backward()
    torch.testing.assert_close(loss, f32(data[f"stage{stage}/c{c}/loss"]), rtol=1e-6 if stage < 8 else 2e-4, atol=0)
    expected = f32(data[f"stage{stage}/c{c}/grad"])
    error = (ft.grad - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)
    assert error.max() < (1e-5 if stage < 8 else 3e-5)


@pytest.mark.parametrize(
    ("name", "method"),
    [
        (
            "stage1_cifar",
            ECT(
                delta=Discretisation(q=2, double_every=1, ratio_limit=0.999, r_min=1e-6),
                c=1e-8,
                t_min=0.002,
                t_max=80.0,
            ),
        ),
        (
            "stage1_img64",
            ECT(
                LogNormal(-0.8, 1.6),
                Discretisation(4, 1, 0.9961, r_min=1e-6),
                losses.inverse_c_out_squared,
                0.06,
                0.002,
                80.0,
            ),
        ),
    ],
)
def test_tcm_stage_1_loss(draws, name, method):
    data = golden("tcm")
    t, r = data[f"random_t/{name}/in_t"], data[f"random_t/{name}/r"]
    draws(f64(data[f"random_t/{name}/draw0_randn_like"]), t, method.times, 0.002, 80.0)
    step = next(s for s in range(20) if torch.allclose(method.delta.r(f64(t), s), f64(r), rtol=1e-6))
    loss, stats = method.loss(method.nets(sine_model()), f64(data["images"]), None, step, 100)
    weighted = method.weight(f64(t), f64(r)) * stats["distance"]
    torch.testing.assert_close(weighted, f64(data[f"random_t/{name}/loss"]), rtol=1e-6, atol=0)
    torch.testing.assert_close(loss, f64(data[f"random_t/{name}/loss"]).mean(), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("name", "weight"),
    [
        ("default", losses.inverse_delta),
        ("cout", losses.inverse_c_out),
        ("cout_sq", losses.inverse_c_out_squared),
        ("sqrt", losses.inverse_sqrt_delta),
        ("one", losses.uniform),
    ],
)
@pytest.mark.parametrize("c", [1e-8, 0.06])
def test_tcm_weights_and_distances(name, weight, c):
    data = golden("tcm")
    key = "fixed_t/default_c1e-08_sqrtTrue_stage3"
    x0, eps, t, r = (f32(data[k]) for k in ("images", f"{key}/draw0_randn_like", f"{key}/in_t", f"{key}/r"))
    model = sine_model()
    ft, fr = model(diffuse(x0, eps, t), t), model(diffuse(x0, eps, r), r)
    loss = weight(t, r) * losses.pseudo_huber(ft, fr, c)
    expected = f32(data[f"fixed_t/{name}_c{'1e-08' if c < 1e-3 else c}_sqrtTrue_stage3/loss"])
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)


def stage_2(name):
    """The published batch with its boundary samples first, which is where ours are."""
    data = golden("tcm")
    p = f"stage2/{name}/"
    boundary = torch.from_numpy(data[p + "draw0_randperm"])[:3]
    rest = torch.tensor([i for i in range(12) if i not in boundary.tolist()])
    order = torch.cat([boundary, rest])
    return {k.removeprefix(p): v for k, v in data.items() if k.startswith(p)} | {
        "order": order,
        "images": data["images"],
    }


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("cifar", TCM(delta=Discretisation(2, 1, 0.999, r_min=1e-6))),
        ("img64", TCM(delta=Discretisation(4, 1, 0.9961, r_min=1e-6), weight=losses.inverse_c_out_squared, c=0.06)),
    ],
)
def test_tcm_stage_2_loss(draws, name, method):
    data = stage_2(name)
    order = data["order"]
    t, r = f64(data["t_student"])[order], f64(data["r_target"])[order]
    draws(f64(data["draw1_randn_like"])[order], t.clamp_min(1.0), LogStudentT(), 1.0, 80.0)
    step = next(s for s in range(20) if torch.allclose(method.delta.r(t, s), r, rtol=1e-6))
    student, frozen = sine_model(3.0), sine_model(1.5)
    nets = Nets(student, Truncated(student, frozen))
    loss, stats = method.loss(nets, f64(data["images"])[order], None, step, 100)
    weighted = method.weight(t, r) * stats["distance"]
    rtol = 2e-6 if name == "cifar" else 1e-6
    torch.testing.assert_close(weighted[:3].sort()[0], f64(data["loss_boundary"]).sort()[0], rtol=rtol, atol=0)
    torch.testing.assert_close(weighted[3:], f64(data["loss"]), rtol=rtol, atol=0)
    expected = f64(data["loss"]).mean() + 0.1 * f64(data["loss_boundary"]).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    assert student.net.rows[0] == 12  # the student's own pass
    assert sum(student.net.rows[1:]) + sum(frozen.net.rows) == 12  # and one target pass a sample, not two


def test_edm_loss(draws):
    data = golden("edm")
    draws(f64(data["draw1"]), data["sigma"], LogNormal(-1.2, 1.2))
    method = DSM()
    model = sine_model()
    loss, stats = method.loss(method.nets(model), f64(data["images"]), None, 0, 1)
    expected = f64(data["loss"]).flatten(1).sum(1)
    torch.testing.assert_close(loss, expected.mean(), rtol=1e-6, atol=0)
