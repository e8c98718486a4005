import pytest
from omegaconf import OmegaConf

from ldm.config import load_config, merge_configs, model_section
from ldm.errors import ConfigError


def test_files_merge_from_left_to_right_and_overrides_win(tmp_path):
    (tmp_path / "a.yaml").write_text("model: {target: x.Y, params: {a: 1, b: 1, c: 1}}\n")
    (tmp_path / "b.yaml").write_text("model: {params: {b: 2, c: 2}}\n")
    merged = merge_configs([tmp_path / "a.yaml", tmp_path / "b.yaml"], ["model.params.c=3"])
    assert OmegaConf.to_container(merged.model.params) == {"a": 1, "b": 2, "c": 3}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"model: [unclosed\n", "not valid YAML"),
        (b"- a list\n", "must be a YAML mapping"),
        (b"just words\n", "has no model section"),
        (b"", "has no model section"),
        (b"data: {}\n", "has no model section"),
        (b"model: {params: {}}\n", "has no model section with a target"),
        (b"\xff\xfe\x00broken", "cannot read|not valid"),
    ],
)
def test_a_config_that_cannot_be_used_says_why_in_one_line(tmp_path, content, message):
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        model_section(load_config(path), path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_text_encoder_that_lies_beside_the_config_is_found_from_anywhere(tmp_path):
    (tmp_path / "clip").mkdir()
    for version, found in (("clip", str(tmp_path / "clip")), ("openai/clip", "openai/clip"), ("", "")):
        path = tmp_path / "config.yaml"
        path.write_text(f"model: {{params: {{cond_stage_config: {{params: {{version: '{version}'}}}}}}}}\n")
        assert load_config(path).model.params.cond_stage_config.params.version == found


def test_a_missing_config_says_where_the_shipped_ones_are(tmp_path):
    with pytest.raises(ConfigError, match="configs/"):
        load_config(tmp_path / "no.yaml")
