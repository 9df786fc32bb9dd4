"""From the command line, the environment and a config file to the settings that are put on a recipe.

The result is a recipe's name and a mapping of dotted keys (``synthesis.steps``) to values, which
:func:`fastdfkd_cli.config.from_dict` checks once the recipe is known: ``auto`` needs the teacher's input first.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fastdfkd_cli.config import from_dict, full_key, parse_value
from fastdfkd_cli.errors import UsageError, brief
from fastdfkd_cli.processes import Part

_DURATION = re.compile(r"(?:(?P<h>\d+(?:\.\d+)?)h)?(?:(?P<m>\d+(?:\.\d+)?)m)?(?:(?P<s>\d+(?:\.\d+)?)s?)?", re.I)
_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?", re.I)
_LIST_OPTION = re.compile(r"--(?:(?:teacher|student)-)?(?:input-size|mean|std)")
_TIME_BUDGET = "schedule.time_budget"
#: What PyYAML lets through beside its own errors: dates that do not exist, ``!!int`` without digits, ten thousand
#: brackets.
_UNREADABLE = (ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError)
#: The name that :class:`~fastdfkd_cli.config.RunConfig` has when no recipe made it.
_NO_RECIPE = "custom"


#: Seconds between two checkpoints of an unfinished run, unless told otherwise.
CHECKPOINT_EVERY = 300.0


def parse_duration(text: str) -> float:
    """Return the seconds in ``90``, ``90s``, ``10m``, ``1.5h`` or ``1h30m``.

    Raises:
        UsageError: not such a duration, or no time at all.
    """
    match = _DURATION.fullmatch(text.strip())
    if match is None or not any(match.groups()):
        raise UsageError(f"{text!r} is not a duration: write 90, 90s, 10m or 1h30m.")
    seconds = sum(float(match[unit] or 0) * scale for unit, scale in (("h", 3600), ("m", 60), ("s", 1)))
    if seconds <= 0:
        raise UsageError(f"{text!r} is no time at all: write 90, 90s, 10m or 1h30m.")
    return seconds


def parse_interval(text: str | None) -> float:
    """Return the seconds of ``--checkpoint-every``: a duration, 0 for never, or the default.

    Raises:
        UsageError: not such a duration.
    """
    if text is None:
        return CHECKPOINT_EVERY
    return 0.0 if text.strip() in ("0", "0s") else parse_duration(text)


def parse_part(text: str | None) -> Part | None:
    """Return the part that ``--part 2/8`` names.

    Raises:
        UsageError: not a part of something.
    """
    if text is None:
        return None
    found = re.fullmatch(r"(\d{1,5})/(\d{1,5})", text.strip(), re.ASCII)
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise UsageError(f"--part must be one of the parts of a whole, such as 2/8, not {text!r}.")
    return Part(int(found[1]), int(found[2]))


def parse_numbers(option: str, text: str | None) -> tuple[float, ...] | None:
    """Return the numbers of ``0.5,0.5,0.5`` or ``0.5 0.5 0.5`` (one per channel); ``option`` is named in the error."""
    if text is None:
        return None
    words = text.replace(",", " ").split()
    if not words or not all(_NUMBER.fullmatch(word) for word in words):
        raise UsageError(f"{option} must be one number per channel, such as 0.5 0.5 0.5, not {text!r}.")
    return tuple(float(word) for word in words)


def parse_input_size(option: str, text: str | None) -> tuple[int, int, int] | None:
    """Return channels, height and width from ``3 32 32``, ``3,32,32`` or ``3x32x32``."""
    if text is None:
        return None
    words = re.split(r"[\s,x]+", text.strip().lower())
    if len(words) != 3 or not all(word.isdecimal() and int(word) > 0 for word in words):
        raise UsageError(f"{option} must be channels, height and width, such as 3 32 32, not {text!r}.")
    channels, height, width = map(int, words)
    return channels, height, width


def join_number_lists(arguments: Iterable[str]) -> list[str]:
    """Turn ``--mean 0.5 0.5 0.5`` into ``--mean=0.5,0.5,0.5``: how many values follow depends on the channels.

    timm's own scripts take such lists separated by spaces, which an option of fixed length cannot.
    """
    joined: list[str] = []
    words = list(arguments)
    while words:
        word = words.pop(0)
        if word == "--":
            return [*joined, word, *words]
        if _LIST_OPTION.fullmatch(word):
            numbers: list[str] = []
            while words and _NUMBER.fullmatch(words[0]):
                numbers.append(words.pop(0))
            joined.append(f"{word}={','.join(numbers)}" if numbers else word)
        else:
            joined.append(word)
    return joined


def parse_assignments(assignments: Iterable[str]) -> dict[str, Any]:
    """Return the full keys and parsed values of ``--set key=value`` words; a later one replaces an earlier one.

    Raises:
        UsageError: no equals sign, an unknown or ambiguous key (with the nearest ones).
    """
    settings: dict[str, Any] = {}
    for assignment in assignments:
        key, equals, value = assignment.partition("=")
        if not equals or not key.strip():
            raise UsageError(f"--set takes key=value, such as synthesis.steps=2, not {assignment!r}.")
        full = full_key(key.strip())
        if full == "recipe":
            raise UsageError("--set puts settings on a recipe; choose the recipe itself with --recipe NAME.")
        settings[full] = plain_value(parse_value(value.strip()), full)
        if value.strip().lower() == "none" and _is_choice(full, "none"):
            settings[full] = "none"  # a word here (synthesis.reuse=none), and "unset" elsewhere
    return settings


def _name_of(source: str) -> str:
    return "standard input" if source == "-" else source


def read_mapping(source: str) -> Mapping[Any, Any]:
    """Read a YAML or JSON file (``-``: standard input) of settings; of a ``report.json``, its ``config``.

    Raises:
        UsageError: the file is not there, or not YAML or JSON.
    """
    name = _name_of(source)
    try:
        text = sys.stdin.read() if source == "-" else Path(source).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise UsageError(f"Cannot read the config file {name}: {reason}.") from error

    import yaml

    class Loader(yaml.SafeLoader):
        """Plain data, and an alias only for a single value: with those of lists, few lines become a billion values."""

        def compose_node(self, parent: Any, index: Any) -> Any:
            event = self.peek_event()
            node = super().compose_node(parent, index)
            if isinstance(event, yaml.AliasEvent) and not isinstance(node, yaml.ScalarNode):
                where = f" (line {event.start_mark.line + 1})" if event.start_mark is not None else ""
                raise UsageError(f"The config file {name} has an alias of a section or list{where}: write it out.")
            return node

    try:
        content = yaml.load(text, Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" (line {mark.line + 1}, column {mark.column + 1})" if mark is not None else ""
        raise UsageError(f"The config file {name} is neither YAML nor JSON{where}.") from error
    except _UNREADABLE as error:
        raise UsageError(f"The config file {name} has a value that cannot be read.") from error
    if content is None:
        content = {}
    if isinstance(content, Mapping) and isinstance(content.get("config"), Mapping):
        content = content["config"]
    if not isinstance(content, Mapping):
        raise UsageError(f"The config file {name} must hold settings as key: value, not {type(content).__name__}.")
    return content


def read_config(source: str) -> tuple[str | None, dict[str, Any]]:
    """Read a file of settings (see :func:`read_mapping`) and return its recipe, if it names one, and the settings.

    The file nests as ``fastdfkd recipes --show NAME`` prints it.

    Raises:
        UsageError: as :func:`read_mapping`; an unknown key.
    """
    settings: dict[str, Any] = {}
    for key, value in read_mapping(source).items():
        section = value if isinstance(value, Mapping) else None
        for full, item in [(str(key), value)] if section is None else [(f"{key}.{k}", v) for k, v in section.items()]:
            known = full_key(full)
            settings[known] = plain_value(item, known)
    recipe = settings.pop("recipe", None)
    if recipe is not None and not isinstance(recipe, str):
        raise UsageError(f"recipe in the config file {_name_of(source)} must be a name, not {brief(recipe)}.")
    return (None if recipe == _NO_RECIPE else recipe), settings


def resolve(
    *,
    recipe: str | None,
    config: str | None,
    environment: Mapping[str, Any],
    assignments: Iterable[str],
    options: Mapping[str, Any],
) -> tuple[str, dict[str, Any]]:
    """Merge all sources: options over ``--set`` over the environment over the file, all of them over the recipe.

    Args:
        recipe: the recipe's name, if the command line or the environment names one.
        config: the config file, or ``-`` for standard input.
        environment: dotted keys -> values that environment variables gave.
        assignments: the words given to ``--set``.
        options: dotted keys -> values of options of their own (``--steps``); None stands for "not given".

    Returns:
        The recipe's name (``auto`` if nobody names one) and the settings to put on it.

    Raises:
        UsageError: what cannot be read; a file of one method's settings under another method.
    """
    from_file: dict[str, Any] = {}
    if config is not None:
        named, from_file = read_config(config)
        recipe = recipe or named
    given = {key: value for key, value in options.items() if value is not None}
    merged = from_file | dict(environment) | parse_assignments(assignments) | given
    of_file = from_file.get("method")
    whole = of_file is not None and any(key.startswith("synthesis.") for key in from_file)
    if whole and merged["method"] != of_file:
        # Of a report, which holds everything, distillation and schedule would stay those of the first method.
        raise UsageError(
            f"The config file {_name_of(config or '')} has the settings of the method {brief(of_file)}, not those of "
            f"{brief(merged['method'])}: give --recipe instead of --config, and what else matters with --set."
        )
    return recipe or "auto", merged


def _is_choice(key: str, word: str) -> bool:
    try:
        from_dict({key: word})
    except UsageError:
        return False
    return True


def plain_value(value: Any, key: str = "") -> Any:
    """Undo what YAML leaves as text: ``1e-3`` has no dot and so is no number to YAML 1.1; durations have units."""
    if isinstance(value, str):
        if key == _TIME_BUDGET:
            return parse_duration(value)
        if _NUMBER.fullmatch(value):
            return float(value)
    return value


__all__ = [
    "join_number_lists",
    "parse_assignments",
    "parse_duration",
    "parse_input_size",
    "parse_interval",
    "parse_numbers",
    "plain_value",
    "read_config",
    "read_mapping",
    "resolve",
]
