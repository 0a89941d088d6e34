"""Finds the modules that an adapter is on, by the settings of PEFT: names, a regular expression, exclusions, layers.

Beside PEFT's own, `attention` and `mlp` name the linear layers of either part of a decoder layer, whatever an
architecture calls them. A pattern that matches nothing is refused, since PEFT leaves such a one out without a word.
"""

import difflib
import re
from collections.abc import Collection, Iterable, Sequence

from veneer.config import UserError

ALL_LINEAR = "all-linear"
ADAPTED = ("exclude_modules", "rank_pattern", "alpha_pattern")  # settings that choose among modules that are adapted
# Parts of the paths of linear layers within a decoder layer, as the architectures of Transformers name them.
NAMED_SETS = {
    "attention": re.compile(r"attn|attention", re.IGNORECASE),
    "mlp": re.compile(r"mlp|ffn|feed_?forward|moe|expert|^fc\d$|^(intermediate|output)$", re.IGNORECASE),
}


def find_targets(
    paths: Sequence[str],
    linear: Sequence[str],
    target_modules: str | Sequence[str],
    exclude_modules: str | Sequence[str] | None = None,
    layers_to_transform: Sequence[int] | None = None,
) -> frozenset[str]:
    """Find the modules that an adapter is on.

    Args:
        paths: paths of all modules that may be adapted.
        linear: those that all-linear means.
        target_modules, exclude_modules, layers_to_transform: settings of the section `adapter`.

    Raises:
        UserError: a pattern or a layer matches nothing, or nothing is left.
    """
    found = _matched("target_modules", target_modules, paths, linear)
    if exclude_modules:
        adapted = [path for path in paths if path in found]
        found -= _matched("exclude_modules", exclude_modules, adapted, [path for path in linear if path in found])
        if not found:
            raise UserError(
                "adapter.exclude_modules: it leaves no module to adapt", "exclude fewer modules than target_modules has"
            )
    if layers_to_transform:
        found = _in_layers(found, layers_to_transform)
    return found


def require_matches(setting: str, patterns: Iterable[str], targets: Collection[str]) -> None:
    """Raise UserError where a key of `rank_pattern` or `alpha_pattern` matches no module that is adapted."""
    for pattern in patterns:
        if not any(matches_end(pattern, path) for path in targets):
            raise matches_nothing(
                setting,
                pattern,
                names_of(sorted(targets)),
                "write the end of a path as the key, such as {q_proj: 32}, or a regular expression of one, such as "
                "'layers.[0-3].mlp.*'",
            )


def rank_of(path: str, r: int, rank_pattern: Iterable[tuple[str, int]]) -> int:
    """Return the rank of a module: that of the first pattern that matches it, as in PEFT; else r."""
    return next((rank for pattern, rank in rank_pattern if matches_end(pattern, path)), r)


def matches_end(pattern: str, path: str) -> bool:
    """Return whether a key of `rank_pattern` or `alpha_pattern` matches a module, as in PEFT: the end of its path."""
    return re.match(rf"(.*\.)?({pattern})$", path) is not None


def _matched(setting: str, pattern: str | Sequence[str], paths: Sequence[str], linear: Sequence[str]) -> frozenset[str]:
    names = names_of(linear)
    if isinstance(pattern, str) and pattern not in (ALL_LINEAR, *NAMED_SETS):
        found = frozenset(path for path in paths if re.fullmatch(pattern, path))
        if not found:
            raise matches_nothing(
                setting,
                pattern,
                names,
                f"write names in a list, such as [{names[0]}]; a string is a regular expression of a whole path, "
                f"such as {paths[0]}",
            )
        return found
    every = frozenset[str]()
    for name in (pattern,) if isinstance(pattern, str) else pattern:
        if name == ALL_LINEAR:
            found = frozenset(linear)
        elif name in NAMED_SETS:
            found = frozenset(path for path in linear if _is_in(path, NAMED_SETS[name]))
        else:
            found = frozenset(path for path in paths if path == name or path.endswith(f".{name}"))
        if not found:
            raise matches_nothing(setting, name, names, f"choose from {', '.join(names)}, or write all-linear")
        every |= found
    return every


def _is_in(path: str, part: re.Pattern[str]) -> bool:
    """Return whether a linear layer belongs to a part of a decoder layer: a word of its path says so."""
    layer = _LAYER.search(path)
    return layer is not None and _part_of(path[layer.end() :].split(".")) is part


def _part_of(words: Iterable[str]) -> re.Pattern[str] | None:
    """Return the set of a path's first word that is of any set: BERT's `attention.output` is attention."""
    return next((part for word in words for part in NAMED_SETS.values() if part.search(word)), None)


_LAYER = re.compile(r"\.(\d+)\.")


def _in_layers(found: frozenset[str], layers: Sequence[int]) -> frozenset[str]:
    """Return the modules in these decoder layers; as in PEFT, a layer is the first number in a path."""
    numbered = {path: int(layer[1]) for path in found if (layer := _LAYER.search(path))}
    there = sorted(set(numbered.values()))
    for number in layers:
        if number not in there:
            raise UserError(
                f"adapter.layers_to_transform: layer {number} has no module of adapter.target_modules",
                f"choose from {there[0]} to {there[-1]}" if there else "leave it out",
            )
    return frozenset(path for path, number in numbered.items() if number in layers)


def names_of(paths: Iterable[str]) -> list[str]:
    """Return the last parts of paths, each once."""
    return list(dict.fromkeys(path.rsplit(".", 1)[-1] for path in paths))


def matches_nothing(setting: str, pattern: str, names: list[str], fix: str) -> UserError:
    """Return the message for a setting of `adapter` that matches nothing, with the nearest names."""
    near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.4) or names
    return UserError(
        f"adapter.{setting}: `{pattern}` matches no module "
        f"{'that is adapted' if setting in ADAPTED else 'of this model'}; nearest: {', '.join(near)}",
        fix,
    )
