"""Reading YAML in the CompVis form: `model: {target, params}`, `data:`, `lightning:`."""

from collections.abc import Iterable
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from ldm.errors import ConfigError

TEXT_ENCODER = "model.params.cond_stage_config.params.version"


def load_config(path: str | Path) -> DictConfig:
    """Read one YAML file, or what the configs in a model's folder in the layout of diffusers amount to.

    The `version` of the text encoder, where it names a folder beside the file, becomes the path of that folder.
    Raises ConfigError where it is missing, unreadable or not a mapping.
    """
    path = Path(path)
    if path.is_dir():
        from ldm.checkpoint.folder_config import to_yaml  # only now, because it loads torch

        return OmegaConf.create(to_yaml(path))
    try:
        config = OmegaConf.load(path)
    except FileNotFoundError as error:
        raise ConfigError(f"no config at {path}; the shipped ones are under configs/ and models/") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the config {path}: {error}") from error
    except (YAMLError, OmegaConfBaseException) as error:
        where = " ".join(str(error).split())
        raise ConfigError(f"{path} is not valid YAML: {where}") from error
    if not isinstance(config, DictConfig):
        raise ConfigError(f"{path} must be a YAML mapping with a `model:` section, got {type(config).__name__}")
    version = OmegaConf.select(config, TEXT_ENCODER, throw_on_resolution_failure=False)
    if isinstance(version, str) and version and (path.parent / version).is_dir():
        OmegaConf.update(config, TEXT_ENCODER, str(path.parent / version))
    return config


def merge_configs(paths: Iterable[str | Path], dotlist: Iterable[str] = ()) -> DictConfig:
    """Merge YAML files from left to right, then `key.sub=value` overrides."""
    try:
        return OmegaConf.merge(*(load_config(path) for path in paths), OmegaConf.from_dotlist(list(dotlist)))
    except OmegaConfBaseException as error:
        raise ConfigError(f"the configs cannot be merged: {error}") from error


def model_section(config: DictConfig, source: str | Path = "the config") -> DictConfig:
    """The `model:` section. Raises ConfigError where it, or its target, is missing."""
    section = config.get("model")
    if not isinstance(section, DictConfig) or "target" not in section:
        raise ConfigError(f"{source} has no model section with a target; is it a Stable Diffusion config?")
    return section
