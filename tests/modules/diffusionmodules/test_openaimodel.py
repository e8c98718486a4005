import fill
import pytest
import torch
from omegaconf import OmegaConf
from support import GOLDENS, assert_matches, cases, golden, manifest

from ldm.modules.attention import SpatialTransformer
from ldm.modules.diffusionmodules import openaimodel
from ldm.modules.diffusionmodules.openaimodel import AttentionBlock, QKVAttention, ResBlock, UNetModel

V1 = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "attention_resolutions": [4, 2, 1],
    "num_res_blocks": 2,
    "channel_mult": [1, 2, 4, 4],
    "num_heads": 8,
    "use_spatial_transformer": True,
    "transformer_depth": 1,
    "context_dim": 768,
    "use_checkpoint": True,
    "legacy": False,
}
V2 = V1 | {"num_heads": -1, "num_head_channels": 64, "use_linear_in_transformer": True, "context_dim": 1024}
XL = {
    "adm_in_channels": 2816,
    "num_classes": "sequential",
    "use_checkpoint": True,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "attention_resolutions": [4, 2],
    "num_res_blocks": 2,
    "channel_mult": [1, 2, 4],
    "num_head_channels": 64,
    "use_linear_in_transformer": True,
    "transformer_depth": [1, 2, 10],
    "context_dim": 2048,
    "spatial_transformer_attn_type": "softmax-xformers",
}
PUBLISHED = {
    "sd-v1": V1,
    "sd-v1-inpainting": V1 | {"in_channels": 9},
    "sd-v2-base": V2,
    "sd-v2-inpainting": V2 | {"in_channels": 9},
    "sd-v2-depth": V2 | {"in_channels": 5},
    "sd-x4-upscaler": V2
    | {
        "in_channels": 7,
        "model_channels": 256,
        "attention_resolutions": [2, 4, 8],
        "channel_mult": [1, 2, 2, 4],
        "num_head_channels": -1,
        "num_heads": 8,
        "num_classes": 1000,
        "disable_self_attentions": [True, True, True, False],
        "disable_middle_self_attn": False,
    },
    "sdxl-base": XL,
    "sdxl-refiner": XL
    | {
        "adm_in_channels": 2560,
        "model_channels": 384,
        "channel_mult": [1, 2, 4, 4],
        "transformer_depth": 4,
        "context_dim": [1280, 1280, 1280, 1280],
    },
    "ldm-txt2img-1p4B": V1 | {"context_dim": 1280},
}
TINY = {
    "image_size": 8,
    "in_channels": 4,
    "model_channels": 32,
    "out_channels": 4,
    "num_res_blocks": 1,
    "attention_resolutions": [2],
    "channel_mult": [1, 2],
    "num_heads": 4,
}


def filled(**options) -> UNetModel:
    return fill.fill_module(UNetModel(**TINY | options).eval(), prefix="model.diffusion_model.")


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_state_dict_has_the_keys_and_shapes_of_the_published_checkpoint(name):
    with torch.device("meta"):
        net = UNetModel(**OmegaConf.create(PUBLISHED[name]))
    prefix = "model.diffusion_model."
    wanted = {key.removeprefix(prefix): shape for key, (shape, _) in manifest(name).items() if key.startswith(prefix)}
    assert {key: tuple(weight.shape) for key, weight in net.state_dict().items()} == wanted


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("sd-v1", 859_520_964),
        ("sd-v2-base", 865_910_724),
        ("sdxl-base", 2_567_463_684),
        ("sdxl-refiner", 2_259_526_660),
        ("ldm-txt2img-1p4B", 872_300_484),
    ],
)
def test_the_number_of_parameters_is_the_published_one(name, number):
    with torch.device("meta"):
        net = UNetModel(**PUBLISHED[name])
    assert sum(parameter.numel() for parameter in net.parameters()) == number


@pytest.mark.parametrize("case", cases("unet"), ids=lambda case: case["name"])
def test_the_prediction_is_that_of_the_original(case):
    arrays, names, params = golden("inputs"), case["inputs"], case["params"]
    config = OmegaConf.load(GOLDENS / f"{params['model']}.yaml").model.params.unet_config.params
    net = fill.fill_module(UNetModel(**config).eval(), prefix="model.diffusion_model.")
    x = arrays[names["x"]]
    if "c_concat" in names:
        x = torch.cat([x, arrays[names["c_concat"]]], dim=1)
    context = arrays[names["c"]] if "c" in names else None
    for t in params["t"]:
        with torch.no_grad():
            out = net(x, torch.full((2,), t), context)
        assert_matches(out, golden("unet")[f"{case['name']}/eps_t{t}"])


def test_channels_last_changes_nothing_but_the_layout():
    x, c = golden("inputs")["x_T"], golden("inputs")["c"]
    net = filled(context_dim=64)
    with torch.no_grad():
        want = net(x, torch.tensor([3, 700]), c)
        got = net.to(memory_format=torch.channels_last)(
            x.to(memory_format=torch.channels_last), torch.tensor([3, 700]), c
        )
    assert_matches(got, want, 1e-5)


def test_half_precision_weights_take_and_give_float32():
    x, c = golden("inputs")["x_T"], golden("inputs")["c"]
    net = filled(context_dim=64)
    with torch.no_grad():
        want = net(x, torch.tensor([3, 700]), c)
        net.to(torch.bfloat16)
        got = net(x, torch.tensor([3, 700]), c)
    assert net.dtype == torch.bfloat16
    assert got.dtype == torch.float32
    assert_matches(got, want, 5e-2)


def test_a_timestep_between_two_others_gives_a_prediction_between_theirs():
    x, net = golden("inputs")["x_T"], filled()
    with torch.no_grad():
        low, middle, high = (net(x, torch.full((2,), t)) for t in (500, 500.05, 500.1))
    assert (middle - (low + high) / 2).norm() < 0.1 * (high - low).norm()


def test_recomputing_activations_leaves_the_gradients_as_they_are():
    x, c = golden("inputs")["x_T"], golden("inputs")["c"]
    gradients = []
    for use_checkpoint in (False, True):
        net = filled(context_dim=64, use_checkpoint=use_checkpoint)
        net(x, torch.tensor([3, 700]), c).square().sum().backward()
        gradients.append([parameter.grad for parameter in net.parameters()])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(
    ("num_classes", "y", "other"),
    [
        (5, torch.tensor([0, 1]), torch.tensor([0, 2])),
        ("continuous", torch.tensor([[0.0], [0.5]]), torch.tensor([[0.0], [1.0]])),
        ("timestep", torch.tensor([0.0, 30.0]), torch.tensor([0.0, 300.0])),
        ("sequential", torch.zeros(2, 6), torch.eye(2, 6).flip(0)),
    ],
)
def test_a_label_of_each_kind_steers_its_own_picture_only(num_classes, y, other):
    x, net = golden("inputs")["x_T"], filled(num_classes=num_classes, adm_in_channels=6)
    if num_classes == "sequential":
        other = other * torch.tensor([[0.0], [1.0]])
    with torch.no_grad():
        first, second = (net(x, torch.tensor([5, 5]), y=label) for label in (y, other))
    assert_matches(second[0], first[0], 1e-6)
    assert (second[1] - first[1]).abs().max() > 1e-3


def test_a_label_must_come_exactly_where_the_model_has_classes():
    x, t = torch.zeros(1, 4, 8, 8), torch.zeros(1)
    with pytest.raises(ValueError, match="y must be given"):
        UNetModel(**TINY, num_classes=3)(x, t)
    with pytest.raises(ValueError, match="y must be given"):
        UNetModel(**TINY)(x, t, y=torch.tensor([0]))


@pytest.mark.parametrize(
    "wrong",
    [{"num_heads": -1}, {"use_spatial_transformer": True}, {"num_classes": "sequential"}, {"num_classes": "many"},
     {"transformer_depth": [1, 1, 1]}],
)
def test_options_that_contradict_each_other_are_refused(wrong):
    with pytest.raises(ValueError, match=r"needs|must|expected"):
        UNetModel(**TINY | wrong)


@pytest.mark.parametrize(
    "options",
    [{"resblock_updown": True}, {"use_scale_shift_norm": True}, {"conv_resample": False}, {"n_embed": 7},
     {"num_head_channels": 16, "num_heads": -1}, {"use_new_attention_order": True}],
    ids=str,
)
def test_every_variant_keeps_the_side_of_the_picture(options):
    with torch.no_grad():
        out = filled(**options)(golden("inputs")["x_T"], torch.tensor([1, 2]))
    assert out.shape == (2, options.get("n_embed", 4), 16, 16)
    assert out.std() > 1e-3


def test_attention_is_placed_level_by_level_where_the_config_says():
    net = UNetModel(
        **TINY | {
            "num_res_blocks": [2, 2], "attention_resolutions": [1, 2], "context_dim": 8, "transformer_depth": [1, 3],
            "num_attention_blocks": [1, 2], "disable_self_attentions": [True, False], "transformer_depth_middle": 2,
        }
    )
    found = [layer for block in net.input_blocks for layer in block if isinstance(layer, SpatialTransformer)]
    assert [len(layer.transformer_blocks) for layer in found] == [1, 3, 3]
    assert [layer.transformer_blocks[0].disable_self_attn for layer in found] == [True, False, False]
    assert len(net.middle_block[1].transformer_blocks) == 2


@pytest.mark.parametrize(("legacy", "heads"), [(True, 2), (False, 4)])
def test_heads_on_the_way_up_may_differ_in_legacy_models_only(legacy, heads):
    net = UNetModel(**TINY, num_heads_upsample=2, legacy=legacy)
    blocks = [layer for block in net.output_blocks for layer in block if isinstance(layer, AttentionBlock)]
    assert {block.num_heads for block in blocks} == {heads}
    assert net.middle_block[1].num_heads == 4


def test_the_two_orders_of_queries_keys_and_values_differ_by_a_permutation_of_the_weights():
    legacy, new = (fill.fill_module(AttentionBlock(32, num_heads=4, use_new_attention_order=n)) for n in (False, True))
    assert isinstance(new.attention, QKVAttention)
    # (heads, 3, d) -> (3, heads, d)
    permute = [w.unflatten(0, (4, 3, 8)).transpose(0, 1).flatten(0, 2) for w in (new.qkv.weight, new.qkv.bias)]
    new.qkv.weight.data, new.qkv.bias.data = permute
    x = golden("inputs")["x_T"].repeat(1, 8, 1, 1)
    torch.testing.assert_close(new(x), legacy(x))


def test_a_residual_block_can_scale_and_shift_by_the_time_embedding():
    block = fill.fill_module(ResBlock(32, 16, 0.0, use_scale_shift_norm=True).eval())
    x, emb = torch.randn(1, 32, 4, 4), torch.randn(1, 16)
    scale, shift = block.emb_layers(emb)[:, :, None, None].chunk(2, dim=1)
    norm, act, _, conv = block.out_layers
    want = x + conv(act(norm(block.in_layers(x)) * (1 + scale) + shift))
    torch.testing.assert_close(block(x, emb), want)


def test_names_rebound_in_the_module_take_effect(monkeypatch):
    seen = []
    monkeypatch.setattr(openaimodel, "timestep_embedding", lambda t, dim, **_: seen.append(dim) or torch.zeros(2, dim))
    filled()(golden("inputs")["x_T"], torch.tensor([1, 2]))
    assert seen == [32]


def test_a_new_model_predicts_nothing_until_it_is_trained():
    assert UNetModel(**TINY)(torch.randn(1, 4, 8, 8), torch.tensor([3])).abs().max() == 0


def test_a_subclass_may_walk_the_blocks_by_itself():
    class Walker(UNetModel):
        def forward(self, x, timesteps=None, context=None, extra=None):
            emb = self.time_embed(openaimodel.timestep_embedding(timesteps, self.model_channels, repeat_only=False))
            h, skips = x.type(self.dtype), []
            for module in self.input_blocks:
                h = module(h, emb, context)
                skips.append(h)
            h = self.middle_block(h, emb, context) + extra
            for module in self.output_blocks:
                h = module(torch.cat([h, skips.pop()], dim=1), emb, context)
            return self.out(h.type(x.dtype))

    x, t, c = golden("inputs")["x_T"], torch.tensor([1, 700]), golden("inputs")["c"]
    base = filled(context_dim=64)
    walker = Walker(**TINY, context_dim=64).eval()
    walker.load_state_dict(base.state_dict())
    torch.testing.assert_close(walker(x, t, c, extra=0.0), base(x, t, c))
    assert not torch.allclose(walker(x, t, c, extra=1.0), base(x, t, c))
