"""Tiny random models of the architectures that the tests go through, with a batch and a loss for each."""

from __future__ import annotations

from collections.abc import Callable

import torch
import transformers as hf
from peft import get_peft_model
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

from peft_dst import DSTConfig


VOCABULARY = 61
# An argument of Trainer's, as transformers 5.23 calls it; before that it was gradient_checkpointing.
CHECKPOINTING = "activation_checkpointing"
if CHECKPOINTING not in hf.TrainingArguments.__dataclass_fields__:
    CHECKPOINTING = "gradient_checkpointing"


def bert(**options: object) -> nn.Module:
    return hf.BertForSequenceClassification(_bert_config(hf.BertConfig, **{"num_labels": 3, **options}))


def roberta() -> nn.Module:
    return hf.RobertaForTokenClassification(_bert_config(hf.RobertaConfig, num_labels=3, pad_token_id=1))


def _bert_config(config: type, **options: object) -> hf.PretrainedConfig:
    return config(
        **{
            "vocab_size": VOCABULARY,
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "max_position_embeddings": 40,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
            **options,
        }
    )


def t5() -> nn.Module:
    return hf.T5ForConditionalGeneration(
        hf.T5Config(
            vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, dropout_rate=0.0,
            feed_forward_proj="gated-gelu", decoder_start_token_id=0, relative_attention_num_buckets=8,
        )
    )  # fmt: skip


def gpt2() -> nn.Module:
    """Conv1D layers, and an output head tied to the token embeddings."""
    return hf.GPT2LMHeadModel(
        hf.GPT2Config(
            vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=32, resid_pdrop=0.0, embd_pdrop=0.0,
            attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip


def _decoder(config: type, **options: object) -> hf.PretrainedConfig:
    return config(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=32,
        **options,
    )


def llama() -> nn.Module:
    return hf.LlamaForCausalLM(_decoder(hf.LlamaConfig))


def mixtral() -> nn.Module:
    """Experts as 3-D parameters."""
    return hf.MixtralForCausalLM(_decoder(hf.MixtralConfig, num_local_experts=4))


def qwen_moe() -> nn.Module:
    return hf.Qwen2MoeForCausalLM(
        _decoder(hf.Qwen2MoeConfig, num_experts=4, moe_intermediate_size=16, shared_expert_intermediate_size=16)
    )


def vit() -> nn.Module:
    return hf.ViTForImageClassification(
        hf.ViTConfig(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=8,
            patch_size=4, num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )
    )  # fmt: skip


BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "bert": bert,
    "gpt2": gpt2,
    "llama": llama,
    "mixtral": mixtral,
    "qwen_moe": qwen_moe,
    "roberta": roberta,
    "t5": t5,
    "vit": vit,
}


def batch(name: str, step: int = 0) -> dict[str, Tensor]:
    """A random batch for a model of this name, always the same for one step."""
    generator = torch.Generator().manual_seed(1000 + step)
    tokens = torch.randint(2, VOCABULARY, (4, 7), generator=generator)
    if name == "vit":
        pixels = torch.randn(4, 3, 8, 8, generator=generator)
        return {"pixel_values": pixels, "labels": torch.randint(0, 3, (4,), generator=generator)}
    if name == "bert":
        return {"input_ids": tokens, "labels": torch.randint(0, 3, (4,), generator=generator)}
    if name == "roberta":
        return {"input_ids": tokens, "labels": torch.randint(0, 3, (4, 7), generator=generator)}
    return {"input_ids": tokens, "labels": tokens}


def loss(model: nn.Module, name: str, step: int = 0) -> Tensor:
    return model(**batch(name, step)).loss


def logits(model: nn.Module, name: str) -> Tensor:
    """Logits of the first batch, in evaluation mode."""
    training = model.training
    model.eval()
    with torch.no_grad():
        output = model(**batch(name)).logits
    model.train(training)
    return output


def train(model: nn.Module, name: str, steps: int = 3, lr: float = 1e-2, first: int = 0) -> None:
    """A plain loop over the trainable parameters."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    for step in range(first, first + steps):
        loss(model, name, step).backward()
        optimizer.step()
        optimizer.zero_grad()


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Copies of a model's own parameters, without adapters' records and dense copies."""
    return {
        name: parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if "_sparse" not in name.split(".") and ".modules_to_save." not in name
    }


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """Two sets of tensors have the same names, dtypes and bits."""
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype
        assert torch.equal(tensor, other[name]), f"{name} differs in {(tensor != other[name]).sum()} components"


def tuned_model(build, name="bert", adapters=("default",), **options):
    """A model with trained adapters, and their logits; the last is active."""
    options = {"epsilon": 0.02, **options}
    base = build(name)
    model = get_peft_model(base, DSTConfig(**options), adapters[0])
    outputs = {}
    for i, adapter in enumerate(adapters):
        if i:
            model.add_adapter(adapter, DSTConfig(**options))
            model.set_adapter(adapter)
        train(model, name, first=10 * i)
        outputs[adapter] = logits(model, name)
    return model, outputs


def native(tmp_path, name="bert"):
    """A tiny base on disk, as users have one, and how to load it."""
    torch.manual_seed(0)
    model = BUILDERS[name]()
    model.save_pretrained(tmp_path / "base")
    return lambda: type(model).from_pretrained(tmp_path / "base")


def compile_layers(model: nn.Module) -> None:
    """Each layer becomes a compiled one, which has it inside."""
    for parent in [module for module in model.modules() if isinstance(module, nn.ModuleList)]:
        for number, layer in enumerate(parent):
            parent[number] = torch.compile(layer, backend="eager")


def checkpoint_layers(model: nn.Module) -> None:
    """A Llama's or a BERT's layers, with wrappers around them that compute activations anew."""
    layers = {"LlamaDecoderLayer", "BertLayer"}
    apply_activation_checkpointing(model, check_fn=lambda module: type(module).__name__ in layers)


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that an optimizer is given."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


class Outer(torch.optim.Optimizer):
    """An optimizer that calls another one's step (as Lookahead does), and then changes the weights further."""

    def __init__(self, inner: torch.optim.Optimizer):
        super().__init__(inner.param_groups, {})
        self.inner = inner

    def step(self, closure: None = None) -> None:
        self.inner.step()
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.mul_(1.25)
