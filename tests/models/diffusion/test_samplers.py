"""The old sampler classes, and the generators under them, beside the outputs of the original."""

import logging

import numpy as np
import pytest
import torch
from support import assert_matches, cases, golden, tiny_model

from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.dpm_solver import DPMSolverSampler
from ldm.models.diffusion.dpm_solver.dpm_solver import DPM_Solver, NoiseScheduleVP, model_wrapper
from ldm.models.diffusion.plms import PLMSSampler
from ldm.sampling import SAMPLERS, Schedule, denoiser, levels, tail

CLASSES = {"ddim": DDIMSampler, "plms": PLMSSampler, "dpm": DPMSolverSampler}
NAMES = {"ddim": "ddim", "plms": "plms", "dpm": "dpm_solver"}
INPUTS = golden("inputs")
SHAPE = (4, 16, 16)

# These two walks magnify a change of x_T 300 and 2000 times, in float64 too, and float32 networks round by 4e-7 a step.
TOLERANCE = {"ddim50_v": 3e-3, "dpm20_v": 5e-3}


def conditionings(case: dict):
    """(conditioning, unconditional) of a golden case."""
    given = {name: INPUTS[array] for name, array in case["inputs"].items()}
    cond, uncond = given.get("c"), given.get("uc")
    match case["params"].get("cond"):
        case "concat":
            return given["c_concat"], None
        case "hybrid":
            cond, uncond = ({"c_concat": [given["c_concat"]], "c_crossattn": [c]} for c in (cond, uncond))
    return cond, None if case["params"].get("no_uc") else uncond


def by_name(case: dict) -> str:
    return case["name"]


@pytest.mark.parametrize("case", cases("sample"), ids=by_name)
def test_the_old_classes_give_the_latents_of_the_original(case):
    params, name = case["params"], case["name"]
    want = {key.split("/")[1]: value for key, value in golden(case["file"]).items() if key.startswith(f"{name}/")}
    model = tiny_model(params["model"])
    cond, uncond = conditionings(case)
    kept = {key: INPUTS[case["inputs"][key]] for key in ("mask", "x0") if key in case["inputs"]}
    torch.manual_seed(params.get("seed", 0))
    samples, seen = CLASSES[params["sampler"]](model).sample(
        S=params["S"],
        conditioning=cond,
        batch_size=2,
        shape=list(SHAPE),
        verbose=False,
        unconditional_guidance_scale=params["scale"],
        unconditional_conditioning=uncond,
        eta=params.get("eta", 0.0),
        x_T=INPUTS["x_T"],
        log_every_t=params.get("log_every_t", 100),
        **kept,
    )
    tolerance = TOLERANCE.get(name, 1e-4)
    assert_matches(samples, want["samples"], tolerance)
    if "log_every_t" in params:
        assert len(seen["x_inter"]) == len(seen["pred_x0"]) == want["n_inter"]
        assert_matches(seen["x_inter"][1], want["x_inter_1"])
        assert_matches(seen["pred_x0"][-1], want["pred_x0_last"])
    if "image" in want:
        with torch.no_grad():
            assert_matches(model.decode_first_stage(samples), want["image"], tolerance)


@pytest.mark.parametrize("name", ["ddim10_s7.5", "ddim20_eta1", "ddim20_inpaint_hybrid", "ddim20_concat",
                                  "ddim20_v_eta1", "plms10_s7.5", "dpm20_eps", "dpm10_eps_s1"])  # fmt: skip
@torch.no_grad()
def test_the_generators_give_the_latents_of_the_original(name):
    (case,) = [case for case in cases("sample") if case["name"] == name]
    params = case["params"]
    model, sampler = tiny_model(params["model"]), NAMES[params["sampler"]]
    schedule = Schedule(model.alphas_cumprod)
    denoise = denoiser(model.apply_model, model.parameterization, *conditionings(case), params["scale"])
    torch.manual_seed(params.get("seed", 0))
    walked = levels(schedule, sampler, params["S"])
    *_, x = SAMPLERS[sampler](denoise, INPUTS["x_T"], walked, schedule, eta=params.get("eta", 0.0))
    assert_matches(x, golden(case["file"])[f"{name}/samples"])


@torch.no_grad()
def test_the_generator_gives_the_original_where_its_caller_blends_in_a_mask():
    model, want = tiny_model(), golden("ddim")["ddim20_mask/samples"]
    schedule = Schedule(model.alphas_cumprod)
    walked, x = levels(schedule, "ddim", 20), INPUTS["x_T"].clone()
    walk = SAMPLERS["ddim"](denoiser(model.apply_model, "eps", INPUTS["c"], INPUTS["uc"], 7.5), x, walked, schedule)
    torch.manual_seed(4321)
    for level in walked[:-1]:
        noised = level.alpha * INPUTS["x0"] + level.sigma * torch.randn_like(INPUTS["x0"])
        x.copy_(noised * INPUTS["mask"] + (1 - INPUTS["mask"]) * x)
        x = next(walk)
    assert_matches(x, want)


@pytest.mark.parametrize("case", cases("img2img"), ids=by_name)
@torch.no_grad()
def test_image_to_image_is_the_originals(case):
    params = case["params"]
    want = {key.split("/")[1]: value for key, value in golden("img2img").items() if key.startswith(case["name"] + "/")}
    model = tiny_model(params["model"])
    z = model.scale_factor * model.encode_first_stage(INPUTS["image"]).mode()
    assert_matches(z, want["z"])

    sampler = DDIMSampler(model)
    sampler.make_schedule(params["S"], ddim_eta=0.0, verbose=False)
    t_enc = int(want["t_enc"])
    z_enc = sampler.stochastic_encode(z, torch.tensor([t_enc] * 2), noise=INPUTS["noise"])
    assert_matches(z_enc, want["z_enc"])
    samples = sampler.decode(z_enc, INPUTS["c"], t_enc, params["scale"], INPUTS["uc"])
    assert_matches(samples, want["samples"])
    assert_matches(model.decode_first_stage(samples), want["image"])

    schedule = Schedule(model.alphas_cumprod)
    start, rest = tail(levels(schedule, "ddim", params["S"]), params["strength"], "ddim", params["S"])
    denoise = denoiser(model.apply_model, "eps", INPUTS["c"], INPUTS["uc"], params["scale"])
    *_, x = SAMPLERS["ddim"](denoise, start.alpha * z + start.sigma * INPUTS["noise"], rest, schedule)
    assert_matches(x, want["samples"])


def k_diffusion_cases() -> list[tuple[str, str]]:
    (case,) = cases("kdiff")
    return [tuple(pair) for pair in case["params"]["samplers"]]


@pytest.mark.parametrize("theirs, spacing", k_diffusion_cases())
@torch.no_grad()
def test_the_karras_samplers_give_the_latents_of_k_diffusion(theirs, spacing):
    (case,) = cases("kdiff")
    params, model = case["params"], tiny_model()
    name = {"sample_euler_ancestral": "euler_a", "sample_dpm_2": "dpm2"}.get(theirs, theirs.removeprefix("sample_"))
    schedule = Schedule(model.alphas_cumprod)
    walked = levels(schedule, name, params["S"], {"model": "default", "karras": "karras"}[spacing])
    denoise = denoiser(model.apply_model, "eps", INPUTS["c"], INPUTS["uc"], params["scale"])
    x = SAMPLERS[name].start(INPUTS["x_T"], walked[0])
    torch.manual_seed(params["seed"])
    *_, x = SAMPLERS[name](denoise, x, walked, schedule)
    assert_matches(x, golden("k_diffusion")[f"kdiff_eps/{theirs}_{spacing}"])


@pytest.mark.parametrize("method", ["uniform", "quad"])
def test_make_schedule_leaves_the_arrays_of_the_original_under_their_names(method):
    want = golden("schedule")
    sampler = DDIMSampler(tiny_model())
    for steps in (10, 20, 50):
        for eta in (0.0, 1.0):
            sampler.make_schedule(steps, ddim_discretize=method, ddim_eta=eta, verbose=False)
            key = f"schedule/{method}_S{steps}"
            assert sampler.ddim_timesteps.tolist() == want[f"{key}_ddim_timesteps"].tolist()
            assert_matches(sampler.ddim_alphas, want[f"{key}_ddim_alphas"])
            assert_matches(sampler.ddim_alphas_prev, want[f"{key}_ddim_alphas_prev"])
            assert_matches(sampler.ddim_sigmas, want[f"{key}_eta{eta:.0f}_ddim_sigmas"])
    assert_matches(sampler.alphas_cumprod, want["schedule/alphas_cumprod"])
    assert_matches(sampler.ddim_sqrt_one_minus_alphas**2, 1 - sampler.ddim_alphas)


class Guess(torch.nn.Module):
    """The smallest model that a sampler can walk with: it predicts a share of x, scaled by its conditioning."""

    num_timesteps = 1000

    def __init__(self, parameterization: str = "eps"):
        super().__init__()
        self.parameterization = parameterization
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
        self.betas = betas.float()
        self.alphas_cumprod = torch.cumprod(1 - betas, 0).float()
        self.alphas_cumprod_prev = torch.cat([torch.ones(1), self.alphas_cumprod[:-1]])
        self.asked = []

    def apply_model(self, x, t, cond):
        self.asked.append((t.tolist(), cond))
        while isinstance(cond, dict | list):
            cond = next(iter(cond.values())) if isinstance(cond, dict) else cond[0]
        return 0.5 * x * (1 if cond is None else cond.view(-1, 1, 1, 1))

    def q_sample(self, x_start, t, noise=None):
        kept = self.alphas_cumprod[t].view(-1, 1, 1, 1)
        return kept.sqrt() * x_start + (1 - kept).sqrt() * torch.randn_like(x_start)


def run(cls, model, S=4, batch_size=2, **options):
    torch.manual_seed(0)
    return cls(model).sample(S, batch_size, (1, 2, 2), verbose=False, **options)


@pytest.mark.parametrize("cls", CLASSES.values())
def test_callbacks_hear_of_every_step_and_the_starting_noise_is_drawn_where_none_is_given(cls):
    steps, clean = [], []
    samples, _ = run(cls, Guess(), callback=steps.append, img_callback=lambda x, i: clean.append((i, x.shape)))
    assert steps == [0, 1, 2, 3]
    assert clean == [(i, (2, 1, 2, 2)) for i in range(4)]
    x_T = torch.randn(2, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(samples, run(cls, Guess(), x_T=x_T)[0])


@pytest.mark.parametrize("cls", [DDIMSampler, PLMSSampler])
def test_intermediates_start_with_the_noise(cls):
    x_T = torch.randn(2, 1, 2, 2)
    samples, seen = run(cls, Guess(), S=5, x_T=x_T, log_every_t=2)
    for kept in seen.values():
        assert kept[0] is x_T and len(kept) == 4
    torch.testing.assert_close(seen["x_inter"][-1], samples)


def test_the_next_batch_goes_on_with_the_generator_where_the_originals_would():
    """One draw to start from and one a step, eta or not; PLMS one more in its first step; DPM-Solver none."""
    for cls, draws in ((DDIMSampler, 5), (PLMSSampler, 6), (DPMSolverSampler, 1)):
        run(cls, Guess())
        state = torch.get_rng_state()
        torch.manual_seed(0)
        for _ in range(draws):
            torch.randn(2, 1, 2, 2)
        assert torch.equal(torch.get_rng_state(), state)


def test_steps_go_through_the_instance():
    """Public code replaces p_sample_ddim and p_sample_plms there; [1] of what they give is the clean latent."""
    for cls, name in ((DDIMSampler, "p_sample_ddim"), (PLMSSampler, "p_sample_plms")):
        sampler = cls(Guess())
        original, seen = getattr(sampler, name), []

        def hook(x, cond, ts, unconditional_conditioning, *args, original=original, seen=seen, **kwargs):
            seen.append((ts.tolist(), kwargs))
            return original(x, cond, ts, *args, unconditional_conditioning=unconditional_conditioning, **kwargs)

        setattr(sampler, name, hook)
        sampler.sample(4, 2, (1, 2, 2), verbose=False, x_T=torch.ones(2, 1, 2, 2))
        assert [ts for ts, _ in seen] == [[751] * 2, [501] * 2, [251] * 2, [1] * 2]
        assert [kwargs["index"] for _, kwargs in seen] == [3, 2, 1, 0]
        if cls is PLMSSampler:
            assert [kwargs["t_next"].tolist() for _, kwargs in seen] == [[501] * 2, [251] * 2, [1] * 2, [1] * 2]
            assert "old_eps" in seen[0][1]


@pytest.mark.parametrize("cls", CLASSES.values())
def test_v_prediction_is_turned_into_noise(cls):
    """A network of v and one of eps that say the same must walk the same way."""
    x_T = torch.randn(2, 1, 2, 2)

    class Velocity(Guess):
        def apply_model(self, x, t, cond):
            schedule = Schedule(self.alphas_cumprod)
            level = schedule.dpm_level(float(t[0]))
            eps = super().apply_model(x, t, cond)
            return (eps - level.sigma * x) / level.alpha

    torch.testing.assert_close(
        run(cls, Guess(), x_T=x_T)[0], run(cls, Velocity("v"), x_T=x_T)[0], atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("cls", CLASSES.values())
def test_a_conditioning_for_another_batch_size_is_warned_of(cls, caplog):
    caplog.set_level(logging.WARNING)
    for cond in (torch.ones(2), [torch.ones(2)], {"c": [torch.ones(2)]}):
        run(cls, Guess(), S=1, conditioning=cond)
    assert not caplog.records
    run(cls, Guess(), S=1, conditioning={"c": [torch.ones(1)]})
    assert "got 1 conditionings but batch_size is 2" in caplog.text


def test_an_extra_numpy_entry_of_a_conditioning_is_left_alone():
    cond = {"dummy_for_plms": np.zeros(2), "c_crossattn": [torch.ones(2)]}
    model = Guess()
    sampler = PLMSSampler(model)

    def hook(x, cond, ts, unconditional_conditioning, *args, **kwargs):
        assert cond["dummy_for_plms"].shape == (2,)
        return x, x, x

    sampler.p_sample_plms = hook
    sampler.sample(4, 2, (1, 2, 2), conditioning=cond, verbose=False)


@pytest.mark.parametrize("cls", CLASSES.values())
def test_what_the_mask_keeps_comes_from_x0_and_needs_it(cls):
    mask, x0 = torch.zeros(2, 1, 2, 2), torch.full((2, 1, 2, 2), 5.0)
    mask[..., 0] = 1
    samples, _ = run(cls, Guess(), S=50, mask=mask, x0=x0)
    free, _ = run(cls, Guess(), S=50)
    assert samples[..., 0].mean() > free[..., 0].mean() + 1
    with pytest.raises(ValueError, match="needs x0"):
        run(cls, Guess(), mask=mask)


def test_plms_has_no_use_for_eta():
    with pytest.raises(ValueError, match=r"ddim_eta must be 0 for PLMS, got 0.5"):
        run(PLMSSampler, Guess(), eta=0.5)


def test_temperature_and_dropout_scale_the_noise_of_ddim():
    x_T = torch.ones(2, 1, 2, 2)
    plain = run(DDIMSampler, Guess(), x_T=x_T)[0]
    torch.testing.assert_close(run(DDIMSampler, Guess(), x_T=x_T, eta=1.0, temperature=0.0)[0],
                               run(DDIMSampler, Guess(), x_T=x_T, eta=1.0, noise_dropout=1.0)[0])  # fmt: skip
    assert not torch.allclose(run(DDIMSampler, Guess(), x_T=x_T, eta=1.0)[0], plain)


@pytest.mark.parametrize("cls", CLASSES.values())
def test_a_score_corrector_edits_what_the_network_says(cls):
    class Halve:
        def modify_score(self, model, out, x, t, c, by):
            return out * by

    class Quarter(Guess):
        def apply_model(self, x, t, cond):
            return super().apply_model(x, t, cond) / 2

    x_T = torch.randn(2, 1, 2, 2)
    got = run(cls, Guess(), x_T=x_T, score_corrector=Halve(), corrector_kwargs={"by": 0.5})[0]
    torch.testing.assert_close(got, run(cls, Quarter(), x_T=x_T)[0])
    with pytest.raises(ValueError, match="corrects eps, but this model predicts v"):
        run(cls, Guess("v"), score_corrector=Halve())


@pytest.mark.parametrize("cls", CLASSES.values())
def test_clean_latents_can_be_quantized_or_limited_in_norm(cls):
    class Codebook:
        def quantize(self, z):
            return z.round(), 0.0, None

    model, clean = Guess(), []
    model.first_stage_model = Codebook()
    run(cls, model, quantize_x0=True, img_callback=lambda x, i: clean.append(x))
    assert all(torch.equal(x, x.round()) for x in clean)
    clean.clear()
    run(cls, model, dynamic_threshold=0.25, img_callback=lambda x, i: clean.append(x))
    assert all(x.flatten(1).square().mean(1).max() <= 0.0626 for x in clean)


def test_a_guidance_scale_for_each_step():
    model = Guess()
    scales = [1.0, 3.0, 3.0, 1.0]
    run(DDIMSampler, model, conditioning=torch.ones(2), unconditional_conditioning=torch.zeros(2), ucg_schedule=scales)
    assert [len(t) for t, _ in model.asked] == [2, 4, 4, 2]
    with pytest.raises(ValueError, match="needs 4 scales"):
        run(DDIMSampler, model, ucg_schedule=[1.0])


def test_encode_is_the_way_back_of_decode():
    sampler, x0, c, heard = DDIMSampler(Guess()), torch.randn(2, 1, 2, 2), torch.ones(2), []
    sampler.make_schedule(500, verbose=False)
    guidance = {"unconditional_guidance_scale": 1.5, "unconditional_conditioning": torch.zeros(2)}
    noise, info = sampler.encode(x0, c, 100, return_intermediates=4, callback=heard.append, **guidance)
    assert_matches(sampler.decode(noise, c, 100, **guidance), x0, 0.02)
    assert (noise - x0).abs().max() > 0.1
    assert info["x_encoded"] is noise
    assert info["intermediate_steps"] == [0, 25, 50, 75, 98, 99] and len(info["intermediates"]) == 6
    assert heard == list(range(100))
    assert "intermediates" not in sampler.encode(x0, c, 2)[1]
    with pytest.raises(ValueError, match="t_enc must be at most 500"):
        sampler.encode(x0, c, 501)


def test_decode_can_walk_the_trained_steps_themselves():
    sampler = DDIMSampler(Guess())
    sampler.make_schedule(10, verbose=False)
    x0 = torch.ones(2, 1, 2, 2)
    noised = sampler.stochastic_encode(x0, torch.tensor([3, 3]), use_original_steps=True, noise=torch.zeros_like(x0))
    torch.testing.assert_close(noised, x0 * sampler.sqrt_alphas_cumprod[3])
    heard = []
    sampler.decode(noised, None, 4, use_original_steps=True, callback=heard.append)
    assert [t[0] for t, _ in sampler.model.asked] == [3, 2, 1, 0] and heard == [0, 1, 2, 3]


def test_the_names_of_dpm_solver_give_what_its_sampler_class_gives():
    model = tiny_model()
    noise_schedule = NoiseScheduleVP("discrete", alphas_cumprod=model.alphas_cumprod)
    noise = model_wrapper(
        model.apply_model, noise_schedule, model_type="noise", guidance_type="classifier-free",
        condition=INPUTS["c"], unconditional_condition=INPUTS["uc"], guidance_scale=7.5,
    )  # fmt: skip
    solver = DPM_Solver(noise, noise_schedule, predict_x0=True, thresholding=False)
    with torch.no_grad():
        x = solver.sample(INPUTS["x_T"], steps=20, skip_type="time_uniform", method="multistep", order=2)
    assert_matches(x, golden("dpm_solver")["dpm20_eps/samples"])


def test_a_noise_schedule_runs_through_the_trained_levels():
    kept = Guess().alphas_cumprod
    schedule = NoiseScheduleVP("discrete", alphas_cumprod=kept)
    times = torch.tensor([1 / 1000, 0.5, 1.0])
    torch.testing.assert_close(schedule.marginal_alpha(times) ** 2, kept[[0, 499, 999]], rtol=1e-5, atol=0)
    torch.testing.assert_close(schedule.marginal_alpha(times) ** 2 + schedule.marginal_std(times) ** 2, torch.ones(3))
    torch.testing.assert_close(schedule.marginal_log_mean_coeff(times).exp(), schedule.marginal_alpha(times))
    between = torch.tensor([0.01, 0.1234, 0.987])
    torch.testing.assert_close(schedule.inverse_lambda(schedule.marginal_lambda(between)), between)
    betas = NoiseScheduleVP("discrete", betas=Guess().betas)
    torch.testing.assert_close(betas.marginal_lambda(times), schedule.marginal_lambda(times), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="must be discrete"):
        NoiseScheduleVP("linear")


@pytest.mark.parametrize("skip_type", ["time_uniform", "time_quadratic", "logSNR"])
@pytest.mark.parametrize("predict_x0", [True, False])
def test_every_way_of_dpm_solver_ends_at_the_same_latent(skip_type, predict_x0):
    model, schedule = Guess(), NoiseScheduleVP("discrete", alphas_cumprod=Guess().alphas_cumprod)
    x_T = torch.randn(2, 1, 2, 2, generator=torch.Generator().manual_seed(1))
    noise = model_wrapper(lambda x, t: model.apply_model(x, t, None), schedule)
    solver = DPM_Solver(noise, schedule, predict_x0)
    ends = [solver.sample(x_T, 120, skip_type=skip_type, method=method, order=order)
            for method in ("multistep", "singlestep") for order in (2, 3)]  # fmt: skip
    (want,) = [DPMSolverSampler(model).sample(600, 2, (1, 2, 2), verbose=False, x_T=x_T)[0]]
    for end in ends:
        assert_matches(end, want, 0.01)
    with pytest.raises(ValueError, match="skip_type must be"):
        solver.sample(x_T, skip_type="even")
