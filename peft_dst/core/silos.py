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

# Tried in this order on every segment of the name below the layer; the first that matches any segment names the kind.
# Norms come first: under the inverse-relative distance their weights (about 1, against 0.02 for a matrix entry) would
# take most of the budget of the attention they stand beside, so they are a kind of their own.
_KINDS: tuple[tuple[str, re.Pattern[str]], ...] = tuple(
    (kind, re.compile(pattern, re.IGNORECASE))
    for kind, pattern in (
        ("norm", r"norm|^ln(_|\d|$)|_ln(_|\d|$)"),
        ("cross_attention", r"encdec|cross_?att|^encoder_attn$"),
        ("attention", r"att(n|ention)"),
        ("router", r"router|^gate$|^shared_expert_gate$"),
        ("experts", r"^experts$"),
        ("feed_forward", r"mlp|ffn|feed_?forward|densereludense|shared_expert|intermediate|^output$|^(fc|lin|wi?)_?\d"),
        ("embeddings", r"emb|^wte$|^wpe$|^shared$|(cls|mask|distillation)_token|patch"),
        ("head", r"head|classifier|^score$|pooler|^cls$|^qa_outputs$"),
    )
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


def layer_and_kind(name: str, patterns: Sequence[re.Pattern[str]] = ()) -> tuple[str, str]:
    """Layer ("" outside any) and kind of module of a parameter name.

    Args:
        name: e.g. "bert.encoder.layer.3.attention.self.query.weight" → ("bert.encoder.layer.3", "attention").
        patterns: compiled `silo_pattern`s; the first that is found in the name decides.
    """
    for pattern in patterns:
        if found := pattern.search(name):
            groups = found.groupdict()
            return groups.get("layer") or "", groups["module"] or "other"
    found = _LAYER.match(name)
    layer = found.group() if found else ""
    segments = name[len(layer) :].lstrip(".").split(".")
    for kind, pattern in _KINDS:
        if any(pattern.search(segment) for segment in segments):
            return layer, kind
    return layer, segments[0] if len(segments) > 1 else "other"


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
    silos: dict[str, list[str]] = {}
    for name in names:
        if siloing == "none":
            silo = "model"
        elif siloing == "parameter":
            silo = name
        else:
            layer, kind = layer_and_kind(name, patterns)
            silo = f"{layer}.{kind}" if layer and siloing == "module_and_layer" else kind
        silos.setdefault(silo, []).append(name)
    return silos
