"""The copy of the goldens in this repository has every kind of tensor that the tests compare."""

import re

import pytest

from conftest import DEFAULT_GOLDENS

# What tests compare where a file has it: the carried copy has each in at least one file of the
# folder.
OPTIONAL = {
    "vae": ("decoded_from_mean", "decoded_from_sampled"),
    "und_forward": (r"\w+\.attention_mask", r"\w+\.hidden_layer0", r"\w+\.hidden_final"),
    "grads": (
        "per_token_jsd",
        "per_token_jsd_unclipped",
        r"grad\.language_model\..+",
        r"grad\.vit_model\..+",
        r"grad\.connector\..+",
    ),
    "jsd": (r"tinker_grad\.\d+",),
    "generate": (
        "logits",
        r"prefill_k_layer\d+",
        r"prefill_v_layer\d+",
        "prefill_k_last",
        "final_k_last",
    ),
    "gen_image": (
        "vae_moments",
        r"k_layer\d+_cond",
        r"k_layer\d+_cfg_text",
        r"k_layer\d+_cfg_img",
        "k_last_cond",
        r"run\d+\.timesteps",
        r"run\d+\.step0_branch_cond",
        r"run\d+\.step0_branch_second",
        r"run\d+\.step0_branch_third",
        r"run\d+\.x_traj",
        r"run\d+\.final_latent_chw",
        r"run\d+\.decoded_preclamp",
        r"run\d+\.image_u8",
        "attention_mask",
        "hidden_final",
    ),
    "opsd_steps": (r"step\d+\.param\..+", r"step\d+\.ema\..+", r"final\.param\..+"),
    "preprocess": (
        r".+\.rgb_sample",
        r".+\.sample_tensor",
        r".+\.tensor",
        r".+\.resized_u8_hwc",
        r".+\.patchified",
        r"pos\.\d+\.extrapolate",
        r"pos\.\d+\.interpolate",
    ),
}


@pytest.mark.parametrize("folder", OPTIONAL)
def test_carried_copy_has_every_kind(folder):
    from safetensors import safe_open

    names = []
    for path in (DEFAULT_GOLDENS / folder).glob("*.safetensors"):
        with safe_open(path, framework="numpy") as file:
            names += file.keys()
    missing = [
        kind for kind in OPTIONAL[folder] if not any(re.fullmatch(kind, name) for name in names)
    ]
    assert not missing


def test_carried_copy_is_small():
    assert sum(path.stat().st_size for path in DEFAULT_GOLDENS.rglob("*")) < 12_000_000
