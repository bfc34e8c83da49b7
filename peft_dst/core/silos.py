"""Which parameters compete with one another: the partition of the model into silos (Appendix A of the DST paper).

A silo is one *kind of module* in one *layer*: the attention of layer 3, the feed-forward of layer 3, the embeddings.
Kind and layer are read off parameter names, so the same rules serve every architecture whose names follow the customs
of the field; for any other, `silo_pattern` says how to read them. Only names are looked at, no module and no tensor.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal, get_args


Siloing = Literal["module_and_layer", "module", "none", "parameter"]
SILOINGS: tuple[str, ...] = get_args(Siloing)

# Tried in this order on every segment of the name below the layer, norms left aside; the first that matches any segment
# names the kind.
_KINDS = (
    ("cross_attention", r"encdec|cross_?att|^encoder_attn$"),
    ("attention", r"att(n|ention)"),
    ("router", r"router|^gate$|^shared_expert_gate$"),
    ("experts", r"^experts$"),
    ("feed_forward", r"mlp|ffn|feed_?forward|densereludense|shared_expert|intermediate|^output$|^(fc|lin|wi?)_?\d"),
    ("embeddings", r"emb|^wte$|^wpe$|^shared$|(cls|mask|distillation)_token|patch"),
    ("head", r"head|classifier|^score$|pooler|^cls$|^qa_outputs$"),
)
# A norm belongs to the module it serves, as it does in the blocks of most code bases: one that stands inside a module to
# that one (read off the rest of its name), one that stands beside several by what its own name says, else by what stands
# beside it. Silos of their own would get next to nothing at a small ε, and norms are worth tuning: on TREC at ε = 1e-4
# that costs two to three points of accuracy (docs/LOG.md).
_NORM = re.compile(r"norm|^ln(_|\d|$)|_ln(_|\d|$)", re.IGNORECASE)
_NORM_KINDS = (
    ("feed_forward", r"^post_attention|feed_?forward|ffn|mlp|^final_layer_?norm$|^output_|^ln_?2$|norm_?2$|after"),
    ("cross_attention", r"encoder_attn|cross"),
    ("attention", r"^input_|attn|attention|^sa_|^ln_?1$|norm_?1$|before"),
    ("embeddings", r"emb"),
)
# Up to and including the first numbered segment: "encoder.layer.3" of "encoder.layer.3.attention.self.query.weight".
_LAYER = re.compile(r"^(?:.*?\.)?\d+(?=\.)")


def compile_silo_patterns(patterns: str | Sequence[str] | None) -> list[re.Pattern[str]]:
    """Compile `silo_pattern`, checking that each names the group it needs.

    Raises:
        ValueError: for an invalid regular expression or one without a group named `module`.
    """
    compiled = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns or []:
        try:
            regex = re.compile(pattern)
        except re.error as error:
            raise ValueError(f"silo_pattern {pattern!r} is not a valid regular expression: {error}") from error
        if "module" not in regex.groupindex:
            raise ValueError(
                f"silo_pattern {pattern!r} has no group named 'module'. Name the part of a parameter's name that says "
                r"what kind of module it is, e.g. r'(?P<layer>blocks\.\d+)\.(?P<module>attn|mlp)'; a group named "
                "'layer' is optional."
            )
        compiled.append(regex)
    return compiled


def read_names(names: Sequence[str], patterns: Sequence[re.Pattern[str]] = ()) -> dict[str, tuple[str, str]]:
    """Read layer and kind of module off parameter names.

    Args:
        names: names of the tuned parameters, in model order.
        patterns: compiled `silo_pattern`s; the first that is found in a name decides.

    Returns:
        name → (layer, kind), e.g. "bert.encoder.layer.3.attention.self.query.weight" → ("bert.encoder.layer.3",
        "attention"); the layer is "" outside any.
    """
    read = {name: _read_name(name, patterns) for name in names}
    beside: dict[str, set[str]] = {}
    for name, (layer, kind) in read.items():
        for module in _modules_around(name) if layer and not _is_norm(name) else []:
            beside.setdefault(module, set()).add(kind)
    for name, (layer, kind) in read.items():
        if layer and _is_norm(name) and kind not in (present := beside.get(layer, set())):
            # T5's sublayers say what they are only by what stands beside the norm; a layer of experts may have no
            # feed-forward for its norm to belong to.
            neighbours = next((beside[m] for m in _modules_around(name) if m in beside), set())
            if len(neighbours) == 1:
                read[name] = layer, next(iter(neighbours))
            elif kind == "feed_forward" and "experts" in present:
                read[name] = layer, "experts"
    return read


def _is_norm(name: str) -> bool:
    return any(_NORM.search(segment) for segment in name.split("."))


def _read_name(name: str, patterns: Sequence[re.Pattern[str]]) -> tuple[str, str]:
    for pattern in patterns:
        if found := pattern.search(name):
            groups = found.groupdict()
            return groups.get("layer") or "", groups["module"] or "other"
    found = _LAYER.match(name)
    layer = found.group() if found else ""
    segments = name[len(layer) :].lstrip(".").split(".")
    norms = [segment for segment in segments if _NORM.search(segment)]
    kind = _first_kind(_KINDS, [segment for segment in segments if segment not in norms])
    if kind is None and norms:
        kind = (_first_kind(_NORM_KINDS, norms) if layer else None) or "norm"
    return layer, kind or (segments[0] if len(segments) > 1 else "other")


def _first_kind(kinds: Sequence[tuple[str, str]], segments: Sequence[str]) -> str | None:
    for kind, pattern in kinds:
        if any(re.search(pattern, segment, re.IGNORECASE) for segment in segments):
            return kind
    return None


def _modules_around(name: str) -> list[str]:
    """The module that holds a parameter, the one around it, and so on."""
    parts = name.split(".")
    return [".".join(parts[:length]) for length in range(len(parts) - 1, 0, -1)]


def partition(names: Sequence[str], siloing: str, patterns: Sequence[re.Pattern[str]] = ()) -> dict[str, list[str]]:
    """Partition parameter names into silos.

    Args:
        names: names of the tuned parameters, in model order, without duplicates.
        siloing: "module_and_layer" (the paper's default), "module" (one kind across all layers), "none" (the whole
            model) or "parameter" (one tensor each).
        patterns: compiled `silo_pattern`s, see `compile_silo_patterns`.

    Returns:
        Silo name → its parameters' names, both in model order.
    """
    read = read_names(names, patterns)
    silos: dict[str, list[str]] = {}
    for name in names:
        layer, kind = read[name]
        silo = {
            "none": "model",
            "parameter": name,
            "module": kind,
            "module_and_layer": f"{layer}.{kind}" if layer else kind,
        }[siloing]
        silos.setdefault(silo, []).append(name)
    return silos
