"""What the peak memory of a training step should be, by method: the formulas of docs/performance.md as code.

A step has three moments at which memory may peak, and its peak is the largest of the three:

* `loss`      the backward pass begins: all that was saved for it is there, and two gradients as large as the logits
* `backward`  the backward pass ends: every gradient that is kept is there, and the last one is being added
* `step`      the optimizer steps: gradients, and whatever the step itself needs

The formulas are text, computed here and printed there: so the page cannot say anything else than the program.

What is saved for the backward pass is counted, not estimated: the model runs forward on tensors without storage, and
autograd tells which it keeps. So the formulas hold for models that no machine at hand could run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import peft
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from peft_dst.core import partition


@dataclass(frozen=True)
class Shape:
    """What the formulas know of a model and a batch. Counts are of entries unless they are called bytes.

    Attributes:
        n: parameters; a tied one counts once.
        bytes: of one weight: 4 in float32, 2 in bfloat16.
        tensor: the largest tensor.
        silo: the largest silo.
        tied: whether that tensor is used twice: at the end of the backward pass its two gradients and their sum meet.
        factors: what Adafactor keeps: a row and a column for each matrix, each vector itself.
        linear: weights of the linear layers that LoRA, SHiRA and Super-Tuning adapt (all but the output layer).
        adapter: parameters of LoRA on those layers, and so of SHiRA and Super-Tuning here.
        subset: DST's free parameters, epsilon * n.
        logits: batch * length * vocabulary.
        saved: bytes kept for the backward pass, the logarithms of the probabilities among them.
        saved_lora: the same under LoRA.
    """

    n: int
    bytes: int
    tensor: int
    silo: int
    tied: bool
    factors: int
    linear: int
    adapter: int
    subset: int
    logits: int
    saved: int
    saved_lora: int


def adapted(model: nn.Module) -> list[nn.Linear]:
    """The linear layers that PEFT's "all-linear" means: all but the output layer."""
    output = model.get_output_embeddings()
    return [module for module in model.modules() if isinstance(module, nn.Linear) and module is not output]


def shape_of(
    make: Callable[[], nn.Module], dtype: torch.dtype, batch: int, length: int, rank: int, epsilon: float
) -> Shape:
    """The shape of a causal language model and a batch of `batch` x `length` tokens; nothing is computed or stored."""
    with torch.device("meta"):
        model, adapter = make().to(dtype), make().to(dtype)
        lora = peft.LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM")
        adapter = peft.get_peft_model(adapter, lora)
    named = dict(model.named_parameters())
    silos = partition(list(named), "module_and_layer").values()
    linear = [module.weight for module in adapted(model)]
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    n = sum(p.numel() for p in named.values())
    return Shape(
        n=n,
        bytes=dtype.itemsize,
        tensor=max(p.numel() for p in named.values()),
        silo=max(sum(named[name].numel() for name in names) for names in silos),
        tied=tied,
        factors=sum(sum(p.shape) if p.dim() > 1 else p.numel() for p in named.values()),
        linear=sum(w.numel() for w in linear),
        adapter=sum(rank * sum(w.shape) for w in linear),
        subset=round(epsilon * n),
        logits=batch * length * model.config.vocab_size,
        saved=_saved(model, batch, length),
        saved_lora=_saved(adapter, batch, length),
    )


def _saved(model: nn.Module, batch: int, length: int) -> int:
    """Bytes that autograd keeps between forward and backward, parameters and buffers aside; a storage counts once."""
    with FakeTensorMode():
        # Attention keeps other things on "meta" than on the CPU, so the forward pass must believe it is on one.
        model._apply(lambda t: torch.empty(t.shape, dtype=t.dtype, device="cpu"))
        own = {t.untyped_storage()._cdata for t in [*model.parameters(), *model.buffers()]}
        kept: dict[int, torch.UntypedStorage] = {}  # as long as it is held, no other storage has its address

        def note(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                kept[storage._cdata] = storage
            return tensor

        tokens = torch.zeros(batch, length, dtype=torch.int64)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            model(input_ids=tokens, labels=tokens)
        return sum(storage.nbytes() for storage in kept.values())


@dataclass(frozen=True)
class Formula:
    """Bytes held throughout a step, and what comes on top at each of its three moments, in the letters of `LETTERS`."""

    held: str
    loss: str
    backward: str
    step: str
    why: str


#: Letter → attribute of `Shape`, explanation.
LETTERS = {
    "n": ("n", "parameters, a tied one once"),
    "d": ("bytes", "bytes of a weight: 4 in float32, 2 in bfloat16"),
    "t": ("tensor", "entries of the largest tensor"),
    "u": ("tied", "1 if that tensor is used twice (tied embeddings), else 0"),
    "s": ("silo", "components of the largest silo"),
    "k": ("subset", "free parameters, εn"),
    "f": ("factors", "what Adafactor keeps: a row and a column a matrix, each vector"),
    "q": ("linear", "weights of the linear layers, the output layer aside"),
    "r": ("adapter", "parameters of LoRA there, and of SHiRA and Super-Tuning"),
    "A": ("saved", "bytes saved for the backward pass"),
    "B": ("saved_lora", "bytes saved for the backward pass under LoRA"),
    "L": ("logits", "logits: batch × length × vocabulary"),
}
# Gradients of the loss with respect to the logarithms of the probabilities, and from it with respect to the logits.
_LOSS = "8*L"
# The two gradients of a tied tensor, while their sum (which stays) is made.
_TIED = "2*u*t*d"
# For each free component two positions as int64, now and before, and the seed's value.
_NOTES = "k*(16 + d)"
# The subset's values in float32, if the weights are in half precision.
_HALF = "2*k*(4 - d)"
# The blocks that the choice looks at again, about a sixteenth of the silo: seed, update, distance, mask.
_CHOICE = "s*(d + 4)/8"
FORMULAS = {
    "full, AdamW": Formula(
        "3*n*d",
        f"A + {_LOSS}",
        f"n*d + {_TIED}",
        "n*d",
        "weights and two moments; the gradients; the fused step needs nothing else",
    ),
    "full, Adafactor": Formula(
        "n*d + f*d",
        f"A + {_LOSS}",
        f"n*d + {_TIED}",
        "n*d + t*d",
        "weights; the gradients; the step goes tensor by tensor, with one update at a time",
    ),
    "LoRA r = 8, AdamW": Formula(
        "n*d + 12*r",
        f"B + {_LOSS}",
        "4*r",
        "4*r",
        "weights; the adapter and its moments in float32, whatever the weights' dtype",
    ),
    "SHiRA, AdamW": Formula(
        "n*d + r*(3*d + 8)",
        f"A + q*d + r*(d + 16) + {_LOSS}",
        "r*d",
        "r*d",
        "every adapted layer keeps a dense tuned copy of its weight for the backward pass, and coordinates as int64",
    ),
    "Super-Tuning, AdamW": Formula(
        "n*d + 16*r",
        f"A + q*d + 8*r + {_LOSS}",
        "4*r",
        "4*r",
        "every adapted layer keeps a dense tuned copy of its weight for the backward pass, and positions as int64",
    ),
    "DST hook, AdamW": Formula(
        f"3*n*d + {_NOTES}",
        f"A + {_LOSS}",
        f"n*d + {_TIED}",
        f"n*d + n*d*(4 - d)/2 + {_CHOICE}",
        "full fine-tuning; in half precision a copy of the tuned weights while the optimizer steps",
    ),
    "static subset, AdamW": Formula(
        "n*d + k*(d + d + 16 + 8)",
        f"A + {_LOSS}",
        f"t*d + {_TIED}",
        "4*k",
        "weights; of the subset positions, seed, value, gradient and moments; one gradient at a time",
    ),
    "DSTOptimizer(AdamW)": Formula(
        f"n*d + 8*n + {_NOTES} + {_HALF}",
        f"A + {_LOSS}",
        f"n*d + {_TIED}",
        f"n*d + {_CHOICE}",
        "moments in float32, whatever the weights' dtype; the fused step goes tile by tile",
    ),
    "DSTOptimizer(Adafactor, release_gradients)": Formula(
        f"n*d + 4*f + {_NOTES} + {_HALF}",
        f"A + {_LOSS}",
        f"s*d + {_TIED}",
        f"s*d + 4*s + 4*t + {_CHOICE}",
        "no gradient outlives its silo's turn; weights, activations, and one silo at work",
    ),
}


def phases(row: str, shape: Shape) -> dict[str, float]:
    """Bytes at each of a row's three moments; the peak is the largest."""
    formula = FORMULAS[row]
    values = {letter: getattr(shape, attribute) for letter, (attribute, _) in LETTERS.items()}
    # The formulas are constants of this module, and the docs print the very text that is computed here.
    return {
        name: eval(f"{formula.held} + {getattr(formula, name)}", {}, values) for name in ("loss", "backward", "step")
    }
