"""DSTConfig: the options of the method, their validation, and nothing else."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from peft.config import PeftConfig
from peft.utils import CONFIG_NAME, PeftType

from .core.distances import DISTANCES, NORMALIZATIONS, Distance, Normalization, normalizer
from .core.iterative import FLUCTUATION, ITERATIONS
from .core.schedule import Schedule
from .core.silos import SILOINGS, Siloing, compile_silo_patterns
from .delta import FORMAT_VERSION, WEIGHTS_NAME, check_depth, describes, read_metadata, reconcile, stamp


DEFAULT_EPSILON = 1e-3
Selection = Literal[
    "dynamic",
    "first_step",
    "random",
    "bitfit",
    "magnitude",
    "fisher",
    "fisher_pretraining",
    "combined",
    "diff_pruning",
    "transfer",
]
SELECTIONS: tuple[str, ...] = get_args(Selection)
# These choose their subset before training, and keep it: from the seed alone, or from what `fix_subset` is given.
BY_SEED = ("random", "bitfit", "magnitude")
GIVEN = ("fisher", "fisher_pretraining", "combined", "diff_pruning", "transfer")
# Where a config keeps, from collecting an adapter's tensors to writing them, what it will say of them. It is no field: the
# config of a model that is only read from describes no file.
COLLECTED = "_collected_records"


@dataclass
class DSTConfig(PeftConfig):
    """Configuration of Dynamic Subset Tuning (Stahlberg, Lichtarge and Kumar, 2024).

    After every optimizer step exactly a fraction epsilon of the tuned parameters differs from the pretrained values;
    which ones is chosen again at every step. See the help of each field, also in docs/options.md.
    """

    epsilon: float | None = field(
        default=None,
        metadata={
            "help": "Fraction of the tuned parameters that may differ from the seed, 0 < epsilon <= 1. 1e-3 if neither "
            "this nor num_free_parameters is given."
        },
    )
    num_free_parameters: int | None = field(
        default=None,
        metadata={"help": "The same budget as an absolute number of parameters, instead of epsilon."},
    )
    siloing: Siloing = field(
        default="module_and_layer",
        metadata={
            "help": "Parameters within which the budget is shared: one kind of module in one layer "
            "('module_and_layer', the paper's default), one kind across all layers ('module'), the whole model "
            "('none') or one tensor ('parameter')."
        },
    )
    silo_pattern: str | list[str] | None = field(
        default=None,
        metadata={
            "help": "Regular expressions, searched in parameter names, for models whose names the built-in rules do not "
            "read: a group named 'module' gives the kind of module, an optional group 'layer' the layer. The first that "
            "is found decides; names without a match follow the built-in rules."
        },
    )
    distance: Distance = field(
        default="inverse_relative",
        metadata={
            "help": "What ranks a component: |seed * change| ('inverse_relative', the paper's default), |change / seed| "
            "('relative') or |change| ('absolute')."
        },
    )
    distance_normalization: Normalization | None = field(
        default=None,
        metadata={
            "help": "Divide distances by the number of parameters of their module in its layer ('size') or by the mean of "
            "its absolute seed values ('mean'), or by those of all modules of its kind ('module_size', 'module_mean'); an "
            "alternative to silos: the former two for siloing 'module' or 'none', the latter for 'none'."
        },
    )
    selection: Selection = field(
        default="dynamic",
        metadata={
            "help": "How the subset is chosen: again at every step ('dynamic'), at the first one ('first_step'), or before "
            "training: at random, all biases ('bitfit'), the largest weights ('magnitude'), or by what peft_dst.fix_subset "
            "is given: scores ('fisher', 'fisher_pretraining', 'combined', 'diff_pruning') or the subset of another "
            "adapter ('transfer'). See docs/selections.md."
        },
    )
    selection_seed: int = field(
        default=0, metadata={"help": "What selection='random' draws from; the same subset on every platform."}
    )
    churn_interval: int = field(
        default=1, metadata={"help": "Choose the subset anew every so many steps, counted from the first."}
    )
    churn_stop: int | float | None = field(
        default=None,
        metadata={
            "help": "Last step at which the subset is chosen, or the same as a fraction of training (0 < f < 1); it is "
            "kept from then on."
        },
    )
    threshold: Literal["exact", "iterative"] = field(
        default="exact",
        metadata={
            "help": "How a silo's threshold is found: 'exact' keeps exactly the budget; 'iterative' tracks it by "
            "bisection, as in the paper's Appendix C (Alg. 2), and keeps the budget only approximately."
        },
    )
    threshold_iterations: int | None = field(
        default=None, metadata={"help": "Bisections a step of threshold='iterative' (the paper's m); 3 if not given."}
    )
    threshold_range: float | None = field(
        default=None,
        metadata={
            "help": "By what factor a threshold may grow or shrink in one step of threshold='iterative' (the paper's r); 2 "
            "if not given."
        },
    )
    target_modules: list[str] | str | None = field(
        default=None,
        metadata={
            "help": "Modules to tune, with everything below them: names or name endings, a regular expression, or "
            "'all-linear'. None tunes every parameter of the base model but the modules_to_save."
        },
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Modules not to tune, with everything below them; names as in target_modules."}
    )
    target_parameters: list[str] | None = field(
        default=None,
        metadata={
            "help": "Single parameters to tune, by name or name ending, e.g. 'experts.gate_up_proj'. With target_modules "
            "None, only these."
        },
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Indices of the layers to tune; parameters outside any layer are left alone."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None,
        metadata={"help": "Name of the list that layers_to_transform counts in, e.g. 'layers' or 'h'; None takes any."},
    )
    modules_to_save: list[str] | None = field(
        default=None,
        metadata={
            "help": "Modules trained densely and saved whole beside the delta, such as a fresh classification head."
        },
    )
    bias: str = field(
        default="none",
        metadata={"help": "Only 'none': biases are parameters like any other, and compete for the budget."},
    )
    init_weights: bool = field(
        default=True,
        metadata={
            "help": "Start from the seed. False starts from a random subset slightly moved, which only tests want."
        },
    )
    packed: bool = field(
        default=False,
        metadata={
            "help": "Save positions coded, in a quarter to a half of their bytes. PEFT's loading opens such a file, "
            "transformers' own (`model.load_adapter`, `AutoModel.from_pretrained` of an adapter) does not."
        },
    )
    # What follows is written by saving, for loading; it is not for users to set.
    records: dict[str, Any] | None = field(
        default=None,
        metadata={
            "help": "Written on saving: entries, position digest and seed checksums of each tensor with entries."
        },
    )
    format_version: int = field(default=FORMAT_VERSION, metadata={"help": "Written on saving: version of the format."})
    requires: str = field(
        default="pip install peft-dst, then `import peft_dst` before loading with peft or transformers",
        metadata={"help": "Written on saving: a note for whoever opens this file after KeyError: 'DST'."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType("DST")
        self._check_budget()
        _check_choice("siloing", self.siloing, SILOINGS)
        _check_choice("distance", self.distance, DISTANCES)
        self._check_selection()
        self._check_threshold()
        _check_choice("bias", self.bias, ("none",), "To train biases densely put their modules in modules_to_save.")
        compile_silo_patterns(self.silo_pattern)
        if self.format_version != FORMAT_VERSION:
            raise ValueError(
                f"this adapter has format version {self.format_version!r}; this peft_dst reads version {FORMAT_VERSION}. "
                "Install a peft_dst that writes that version, or save the adapter again with this one."
            )
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            setattr(self, name, set(value) if isinstance(value, list) else value)
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern is given without layers_to_transform; say which layers it should pick.")
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ValueError(
                "layers_to_transform cannot be combined with target_modules as a regular expression; put the layers "
                "into the expression, or give target_modules as a list."
            )

    def _check_budget(self) -> None:
        if self.epsilon is not None and self.num_free_parameters is not None:
            raise ValueError(
                f"epsilon={self.epsilon} and num_free_parameters={self.num_free_parameters} are two ways to set one "
                "budget; give one of them."
            )
        if self.num_free_parameters is not None:
            if type(self.num_free_parameters) is not int or self.num_free_parameters < 1:
                raise ValueError(f"num_free_parameters must be a positive integer, got {self.num_free_parameters!r}.")
            return
        if self.epsilon is None and self.selection == "bitfit":
            # There are as many as there are.
            return
        if self.epsilon is None:
            self.epsilon = DEFAULT_EPSILON
        if isinstance(self.epsilon, bool) or not isinstance(self.epsilon, int | float) or not 0 < self.epsilon <= 1:
            raise ValueError(
                f"epsilon must be a fraction with 0 < epsilon <= 1, got {self.epsilon!r}. To give an absolute number of "
                "free parameters use num_free_parameters."
            )

    def _check_selection(self) -> None:
        _check_choice("selection", self.selection, SELECTIONS)
        if self.distance_normalization is not None:
            _check_choice("distance_normalization", self.distance_normalization, NORMALIZATIONS)
        for option in ("epsilon", "num_free_parameters"):
            if self.selection == "bitfit" and (value := getattr(self, option)) is not None:
                raise ValueError(
                    f"selection='bitfit' tunes all biases; {option}={value} cannot be kept. Leave {option} out, or choose "
                    "another selection."
                )
        if self.distance_normalization:
            wider = ("none",) if normalizer(self.distance_normalization)[0] else ("module", "none")
            if self.siloing not in wider:
                raise ValueError(
                    f"distance_normalization={self.distance_normalization!r} changes nothing with "
                    f"siloing={self.siloing!r}: it would divide all distances within a silo by the same. Set siloing to "
                    f"{' or '.join(map(repr, wider))}, or leave the normalization out."
                )
        if type(self.selection_seed) is not int or not -(2**63) <= self.selection_seed < 2**63:
            raise ValueError(f"selection_seed must be an integer of at most 64 bits, got {self.selection_seed!r}.")
        if type(self.churn_interval) is not int or self.churn_interval < 1:
            raise ValueError(f"churn_interval must be a positive integer, got {self.churn_interval!r}.")
        stop = self.churn_stop
        if stop is not None and not ((type(stop) is int and stop >= 1) or (isinstance(stop, float) and 0 < stop < 1)):
            raise ValueError(
                f"churn_stop must be a positive number of steps or a fraction of training (0 < f < 1), got {stop!r}."
            )
        if self.selection != "dynamic" and (self.churn_interval != 1 or stop is not None):
            raise ValueError(
                f"churn_interval={self.churn_interval} and churn_stop={stop} say when selection='dynamic' chooses; "
                f"selection={self.selection!r} chooses once. Leave them out."
            )
        if self.fixed and (self.threshold != "exact" or self.distance_normalization):
            raise ValueError(
                f"selection={self.selection!r} measures no distances while training, so threshold={self.threshold!r} and "
                f"distance_normalization={self.distance_normalization!r} have no meaning. Leave them out."
            )

    @property
    def fixed(self) -> bool:
        """Whether the subset is chosen before training, and kept."""
        return self.selection in BY_SEED + GIVEN

    @property
    def schedule(self) -> Schedule:
        """At which steps the subset is chosen."""
        return Schedule(stop=1) if self.selection == "first_step" else Schedule(self.churn_interval, self.churn_stop)

    @property
    def trainable_token_indices(self) -> None:
        """Other methods' option, which TRL looks for when a chat template brings tokens of its own. DST has none."""
        return

    @trainable_token_indices.setter
    def trainable_token_indices(self, tokens: object) -> None:
        raise ValueError(
            f"trainable_token_indices={tokens!r} asks for single rows of an embedding to be trained densely, but DST "
            "trains whole modules densely or not at all. Add the tokens first (for TRL's chat_template_path: model, "
            "tokenizer, _ = trl.clone_chat_template(model, tokenizer, path)), then train without that option and with "
            "modules_to_save=['embed_tokens', 'lm_head'] in DSTConfig."
        )

    def _check_threshold(self) -> None:
        _check_choice("threshold", self.threshold, ("exact", "iterative"))
        m, r = self.threshold_iterations, self.threshold_range
        if self.threshold == "exact":
            if m is not None or r is not None:
                raise ValueError(
                    f"threshold_iterations={m} and threshold_range={r} belong to threshold='iterative'; leave them out, or "
                    "set threshold to that."
                )
            return
        self.threshold_iterations = m = ITERATIONS if m is None else m
        self.threshold_range = r = FLUCTUATION if r is None else r
        if type(m) is not int or m < 1:
            raise ValueError(f"threshold_iterations must be a positive integer, got {m!r}.")
        if isinstance(r, bool) or not isinstance(r, int | float) or not 1 < r < math.inf:
            raise ValueError(f"threshold_range must be a finite number greater than 1, got {r!r}.")

    @property
    def tracking(self) -> tuple[int, float] | None:
        """(m, r) of Alg. 2 where thresholds are tracked, else None."""
        if self.threshold_iterations is None or self.threshold_range is None:
            return None
        return self.threshold_iterations, self.threshold_range

    @classmethod
    def from_json_file(cls, path_json_file: str, **kwargs: Any) -> dict[str, Any]:
        """Read adapter_config.json. A save that was cut short leaves it behind the tensors; what their file says counts."""
        config = super().from_json_file(path_json_file, **kwargs)
        check_depth(path_json_file, config)
        tensors = Path(path_json_file).with_name(WEIGHTS_NAME)
        return reconcile(config, read_metadata(tensors)) if tensors.is_file() else config

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write adapter_config.json, and its format metadata into an adapter_model.safetensors beside it.

        PEFT writes the tensors first and this file next, and offers no way to say what the first one's metadata is.
        """
        path = Path(save_directory) / CONFIG_NAME
        self.records = self.__dict__.pop(COLLECTED, None)
        if self.records is not None and not describes(self.records, path.parent):
            # They were collected for something else than what stands there.
            self.records = None
        if self.records is None and (path.parent / WEIGHTS_NAME).is_file() and path.is_file():
            # Only the config is saved again; the tensors beside it are still those that the old one describes.
            self.records = json.loads(path.read_text()).get("records")
        super().save_pretrained(save_directory, **kwargs)
        stamp(save_directory)
        # They describe what was just written. Another model made from this config starts without any.
        self.records = None


def _check_choice(name: str, value: object, choices: tuple[str, ...], remedy: str = "") -> None:
    if value not in choices:
        allowed = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"{name} must be one of {allowed}; got {value!r}. {remedy}".rstrip())
