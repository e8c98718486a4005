"""Options that are set outside the command line, by ldm.toml and the environment, and where each value is from.

Whoever comes later wins: default, model YAML, ldm.toml, its table for the script, LDM_<OPTION>, command line, row of a
file. Standard library only.
"""

import json
import os
import re
import shlex
from argparse import Action, ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ldm.errors import RequestError
from ldm.generation.options import REPOSITORY

FILE = Path("ldm.toml")
PREFIX = "LDM_"
WORDS = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
KINDS = {int: "a whole number", float: "a number"}


class Setting(NamedTuple):
    """The `spelling` of an option, its value, where that is from as it is told, and if it is for this script alone."""

    name: str
    value: Any
    source: str
    alone: bool = False


class Switch(Action):
    """A flag that --no-NAME takes back, so that the command line has the last word over ldm.toml."""

    def __init__(self, option_strings, dest, default=False, required=False, help=None):
        self.back = [] if default is None else [
            f"--no-{name[2:]}" for name in option_strings if name.startswith("--") and not name.startswith("--no-")
        ]
        super().__init__([*option_strings, *self.back], dest, nargs=0, default=default, required=required, help=help)

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        setattr(namespace, self.dest, option_string not in self.back)


def spelling(option: str) -> str:
    """A long option as the key of ldm.toml: --From-File is from_file."""
    return option.lstrip("-").replace("-", "_").lower()


def key(action: Action) -> str:
    """The first long spelling of an option, as it stands in ldm.toml."""
    return next(name for name in action.option_strings if name.startswith("--"))[2:].replace("-", "_")


def options_of(parser: ArgumentParser) -> dict[str, Action]:
    """The long options by their `spelling`, without those that take a flag back."""
    return {spelling(name): action for action in parser._actions for name in action.option_strings
            if name.startswith("--") and name.replace("--no-", "--", 1) not in set(action.option_strings) - {name}}


def adopt(parser: ArgumentParser, shared: Callable[[], Collection[str]]) -> dict[str, str]:
    """Make what is set outside the command line the defaults of a parser; gives where each `dest` is from.

    shared: gives the names that may be set for all scripts at once; those that this one does not have mean nothing to
    it, nor do variables that another script has an option for. Raises RequestError for any other name, with the
    nearest, and for a value that the option does not take.
    """
    options, sources = options_of(parser), {}
    for setting in (*from_file(FILE, Path(parser.prog).stem), *from_environment(os.environ)):
        action = options.get(setting.name)
        if action is None:
            exported = setting.source.startswith(PREFIX) and setting.name in of_scripts()
            if not exported and (setting.alone or setting.name not in shared()):
                raise RequestError(unknown(setting, {*options, *([] if setting.alone else shared())}))
            continue
        value = convert(action, setting)
        if value is None:
            continue
        parser.set_defaults(**{action.dest: value})
        sources[action.dest] = setting.source
        if action.const is None and action.help and "%(default)" not in action.help:
            action.help += " (default: %(default)s)"
    return sources


def of_scripts() -> set[str]:
    """The `spelling` of every option that a script declares by itself, read in its text."""
    texts = (file.read_text(encoding="utf-8") for file in (REPOSITORY / "scripts").glob("*.py"))
    return {spelling(name) for text in texts for name in re.findall(r'"(--[A-Za-z][\w-]+)"', text)}


def from_file(path: Path, script: str) -> Iterator[Setting]:
    """The settings of a TOML file: the keys for all scripts, then those of the table that is named for this one."""
    content = read_toml(path) if path.exists() else {}
    scripts = {file.stem for file in (REPOSITORY / "scripts").glob("*.py")}
    for key, value in content.items():
        if not isinstance(value, dict):
            yield Setting(spelling(key), value, str(path))
        elif key not in scripts:
            raise RequestError(f"{path}: there is no script {key!r} for a table [{key}]; the nearest is "
                               f"[{nearest(key, scripts)}]")
    own = content.get(script)
    for key, value in own.items() if isinstance(own, dict) else ():
        yield Setting(spelling(key), value, f"{path} [{script}]", alone=True)


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file. Raises RequestError where that fails."""
    import tomllib

    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RequestError(f"{path} is not valid TOML: {error}") from error
    except OSError as error:
        raise RequestError(f"cannot read {path}: {error.strerror}") from error


def from_environment(environment: Mapping[str, str]) -> Iterator[Setting]:
    """The settings of the variables LDM_<OPTION>."""
    for key, value in environment.items():
        if key.startswith(PREFIX):
            yield Setting(spelling(key.removeprefix(PREFIX)), value, key)


def unknown(setting: Setting, names: Collection[str]) -> str:
    """What is said of a name that no option has."""
    said = f"{setting.source}: there is no option {setting.name!r}"
    near = nearest(setting.name, names)
    if setting.source.startswith(PREFIX):
        return f"{said} for it; the nearest is {PREFIX}{near.upper()}"
    hint = "" if setting.alone else "; what one script alone has goes under [its name]"
    return f"{said}; the nearest is {near!r}{hint}"


def nearest(name: str, names: Collection[str]) -> str:
    from difflib import get_close_matches

    return get_close_matches(name, sorted(names), 1, cutoff=0.0)[0]


def convert(action: Action, setting: Setting) -> Any:
    """The value as the option's own, None where it changes nothing. Raises RequestError where it takes none such."""
    value = setting.value
    try:
        if action.nargs == 0:
            return flag(action, value)
        if action.nargs is None:
            return single(action, ",".join(map(str, value)) if isinstance(value, list) else value)
        if setting.source.startswith(PREFIX):
            value = shlex.split(value)
        return tuple(single(action, one) for one in (value if isinstance(value, list) else [value]))
    except (ArgumentTypeError, ValueError) as error:
        raise RequestError(f"{setting.source}: {setting.name} {error}, got {setting.value!r}") from error


def flag(action: Action, value: Any) -> Any:
    on = value if isinstance(value, bool) else WORDS.get(str(value).lower())
    if on is None:
        raise ValueError("must be true or false")
    if action.const is not None:
        return action.const if on else None
    return on


def single(action: Action, value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError("must be one value")
    try:
        value = action.type(str(value)) if action.type else str(value)
    except ValueError as error:
        raise ValueError(f"must be {KINDS.get(action.type, error)}") from error
    if action.choices is not None and value not in action.choices:
        raise ValueError(f"must be one of {', '.join(map(str, action.choices))}")
    return value


@dataclass(frozen=True)
class Origins:
    """Where the value of each option of a parser is from: what --print_config tells.

    values: as they were parsed; sources: those set outside the command line; given: the `dest` of those set on it.
    """

    parser: ArgumentParser
    values: Mapping[str, Any]
    sources: Mapping[str, str]
    given: Collection[str]

    def lines(self, args: Namespace, yaml: Mapping[str, Any] | None = None, path: str = "") -> Iterator[str]:
        """Each option as a line of TOML with where it is from behind it, so that the whole may be kept as ldm.toml.

        args: the options as they are now. yaml: what the model's YAML at `path` says where they are silent.
        """
        for name, action in self.options().items():
            value, source = getattr(args, action.dest), self.source(action.dest, args)
            if value is None and yaml and action.dest in yaml:
                value, source = yaml[action.dest], f"model YAML, {path}"
            if action.nargs == 0 and action.const is not None:
                value = value == action.const
            setting = f"# {name} is not set" if silent(value) else f"{name} = {toml(value)}"
            yield f"{setting:<56}# {source}"

    def options(self) -> dict[str, Action]:
        """Each option once, by its first spelling; a shorthand such as --plms is left to the option that it sets."""
        full = {action.dest for action in self.parser._actions if action.nargs != 0}
        return {key(action): action for action in options_of(self.parser).values()
                if action.dest in self.values and not (action.const is not None and action.dest in full)}

    def source(self, dest: str, args: Namespace) -> str:
        if getattr(args, dest) != self.values[dest]:
            return "what the others ask for"
        return "command line" if dest in self.given else self.sources.get(dest, "default")

    def name(self, dest: str) -> str:
        """The option of a `dest`, or the `dest` where it is none."""
        return next((name for name, action in self.options().items() if action.dest == dest), dest)


def silent(value: Any) -> bool:
    return value is None or value in ((), [], [None])


def toml(value: Any) -> str:
    """A value as TOML writes it, which JSON does too for all that options are."""
    return json.dumps(list(value) if isinstance(value, tuple) else value, ensure_ascii=False)
