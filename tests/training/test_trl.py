"""TRL's trainers with `peft_config=DSTConfig(…)`: SFT, DPO, GRPO and reward modelling, each beside its dense twin."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
import transformers as hf
from datasets import Dataset, disable_progress_bars
from peft import PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn

from peft_dst import DSTConfig, DSTOptimizer, fix_subset
from tests.models import assert_same, weights
from tests.training.twins import Dense, Project, differing


trl = pytest.importorskip("trl", reason="TRL is not installed (it is in the test extra from Python 3.11 on)")
pytestmark = [
    # TRL 1.16 calls methods by the names that they had before transformers 5.
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing.*` is deprecated:FutureWarning"),
]
disable_progress_bars()

WORDS = ["the", "cat", "sat", "on", "a", "mat", "while", "dog", "ran", "to", "house", "and", "saw", "two", "birds"]
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>"]
TEXTS = ["the cat sat on the mat", "a dog ran to the house and saw two birds", "two birds sat on a mat"]
PAIRS = {
    "prompt": ["the cat", "a dog", "two birds"] * 4,
    "chosen": [" sat on the mat", " ran to the house", " saw a dog"] * 4,
    "rejected": [" ran to a bird", " sat and saw", " on on the house"] * 4,
}


def tokenizer() -> hf.PreTrainedTokenizerBase:
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(SPECIAL + WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    names = dict(zip(("unk_token", "bos_token", "eos_token", "pad_token"), SPECIAL, strict=True))
    return hf.PreTrainedTokenizerFast(tokenizer_object=words, **names)


def llama(cls: type = hf.LlamaForCausalLM, **options: object) -> nn.Module:
    torch.manual_seed(0)
    return cls(
        hf.LlamaConfig(
            vocab_size=len(SPECIAL + WORDS), hidden_size=16, intermediate_size=32, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=32, bos_token_id=1, eos_token_id=2,
            pad_token_id=3, **options,
        )
    )  # fmt: skip


def arguments(cls: type, folder: Path, **options: object):
    return cls(
        **{
            "output_dir": str(folder),
            "num_train_epochs": 3,
            "per_device_train_batch_size": 4,
            "learning_rate": 3e-2,
            "lr_scheduler_type": "constant",
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
            "use_cpu": True,
            "bf16": False,
            "dataloader_pin_memory": False,
            **options,
        }
    )


def losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def sft(model, folder, texts=tuple(TEXTS * 4), processing_class=None, trainer_options=None, **options):
    trainer = trl.SFTTrainer(
        model,
        args=arguments(trl.SFTConfig, folder, **options),
        train_dataset=Dataset.from_dict({"text": list(texts)}),
        processing_class=processing_class or tokenizer(),
        **(trainer_options or {}),
    )
    trainer.train()
    return trainer


def dpo(model, folder, trainer_options=None, **options):
    return trl.DPOTrainer(
        model,
        args=arguments(trl.DPOConfig, folder, **options),
        train_dataset=Dataset.from_dict(PAIRS),
        processing_class=tokenizer(),
        **(trainer_options or {}),
    )


def reference(trainer) -> torch.Tensor:
    """Log-probabilities of the first batch under what the trainer takes for its reference."""
    inputs = next(iter(trainer.get_eval_dataloader(trainer.train_dataset)))
    return torch.stack(trainer.compute_ref_log_probs(trainer.ref_model or trainer.model, inputs))


def twin_of(trainer, cls: type = hf.LlamaForCausalLM) -> Dense:
    return Dense(llama(cls, **({"num_labels": 1} if "Sequence" in cls.__name__ else {})), trainer.model.constraint())


@pytest.mark.parametrize(
    "options",
    [{}, {"bf16": True, "gradient_accumulation_steps": 3}, {"packing": True}, {"gradient_checkpointing": False}],
    ids=lambda o: "-".join(map(str, o)) or "plain",
)
def test_sft_equals_its_dense_twin(options, tmp_path):
    base = llama()
    seed = weights(base)
    trainer = sft(base, tmp_path, trainer_options={"peft_config": DSTConfig(epsilon=0.02)}, **options)
    found = losses(trainer)
    assert found[-1] < found[0]
    assert differing(trainer.model, seed) == trainer.model.constraint().budget
    # TRL multiplies by this matrix itself; an adapter beside it would be passed by.
    assert (trainer.model.get_base_model().lm_head.weight != seed["lm_head.weight"]).any()
    twin = twin_of(trainer)
    assert found == losses(sft(twin.model, tmp_path, trainer_options={"callbacks": [Project(twin)]}, **options))
    assert_same(weights(trainer.model.get_base_model()), weights(twin.model))
    trainer.save_model(str(tmp_path / "adapter"))
    loaded = PeftModel.from_pretrained(llama(), tmp_path / "adapter")
    assert_same(weights(loaded.get_base_model()), weights(twin.model))


@pytest.mark.parametrize(
    ("config", "dtype", "chosen"),
    [
        ({}, torch.float32, {"optimizer_cls_and_kwargs": (DSTOptimizer, {"lr": 3e-2, "weight_decay": 0.0})}),
        ({}, torch.bfloat16, {"optimizer_cls_and_kwargs": (DSTOptimizer, {"lr": 3e-2, "weight_decay": 0.0})}),
        ({"selection": "magnitude"}, torch.float32, {}),
    ],
    ids=["silo_by_silo", "silo_by_silo-bf16", "static"],
)
def test_sft_with_other_optimizers_and_selections(config, dtype, chosen, tmp_path):
    base = llama().to(dtype)
    seed = weights(base)
    options = {"peft_config": DSTConfig(epsilon=0.02, **config), **chosen}
    trainer = sft(base, tmp_path, trainer_options=options)
    assert losses(trainer)[-1] < losses(trainer)[0]
    budget = trainer.model.constraint().budget
    # In bfloat16 a value may round to its seed, and a static subset has rows of words that never occur.
    exactly = dtype == torch.float32 and not config
    assert (1.0 if exactly else 0.8) * budget <= differing(trainer.model, seed) <= budget
    with trainer.model.disable_adapter():
        assert_same(weights(trainer.model.get_base_model()), seed)


@pytest.mark.parametrize("precompute", [False, True])
def test_dpo_refers_to_the_seed(precompute, tmp_path):
    base = llama()
    seed = weights(base)
    options = {"precompute_ref_log_probs": precompute}
    trainer = dpo(base, tmp_path, {"peft_config": DSTConfig(epsilon=0.02)}, **options)
    before = reference(trainer)
    trainer.train()
    found = losses(trainer)
    assert found[0] == pytest.approx(math.log(2), rel=1e-6)
    assert found[-1] < found[0]
    assert differing(trainer.model, seed) == trainer.model.constraint().budget
    twin = twin_of(trainer)
    other = dpo(twin.model, tmp_path, {"ref_model": llama(), "callbacks": [Project(twin)]}, **options)
    other.train()
    assert found == losses(other)
    assert_same(weights(trainer.model.get_base_model()), weights(twin.model))
    # After training the reference is the seed still, bit for bit.
    assert torch.equal(reference(trainer), before)
    assert torch.equal(reference(other), before)


@pytest.mark.parametrize(
    ("selection", "loaded"),
    [("dynamic", True), ("dynamic", False), ("random", True), ("fisher", True), ("fisher", False)],
)
def test_dpo_trains_an_adapter_further_and_refers_to_what_it_was(selection, loaded, tmp_path):
    """TRL copies the adapter's values into one called `ref`, tensor by tensor, and leaves the positions to us."""
    base = llama()
    seed = weights(base)
    model = get_peft_model(base, DSTConfig(epsilon=0.02, selection=selection))
    if selection == "fisher":
        fix_subset(model, {name: torch.rand(tensor.shape) for name, tensor in seed.items()})
    sft(model, tmp_path)
    tuned = weights(model.get_base_model())
    if loaded:
        model.save_pretrained(tmp_path / "sft")
        model = PeftModel.from_pretrained(llama(), tmp_path / "sft", is_trainable=True)

    trainer = dpo(model, tmp_path, gradient_accumulation_steps=2)
    before = reference(trainer)
    assert_same(weights(model.get_base_model()), tuned)
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(math.log(2), rel=1e-6)
    assert losses(trainer)[-1] < losses(trainer)[0]
    assert torch.equal(reference(trainer), before)
    budget = model.constraint().budget
    # A static subset has rows of words that never occur.
    assert (1.0 if selection == "dynamic" else 0.8) * budget <= differing(model, seed) <= budget
    assert any(not torch.equal(now, tuned[name]) for name, now in weights(model.get_base_model()).items())

    if selection == "dynamic":
        twin = Dense(llama(), model.constraint())
        twin.model.load_state_dict(tuned)
        start = copy.deepcopy(twin.model)
        other = dpo(
            twin.model, tmp_path, {"ref_model": start, "callbacks": [Project(twin)]}, gradient_accumulation_steps=2
        )
        other.train()
        assert torch.equal(reference(other), before)
        assert_same(weights(model.get_base_model()), weights(twin.model))

    trainer.save_model(str(tmp_path / "dpo"))
    again = PeftModel.from_pretrained(llama(), tmp_path / "dpo")
    assert_same(weights(again.get_base_model()), weights(model.get_base_model()))
    again.load_adapter(tmp_path / "dpo" / "ref", "ref")
    again.set_adapter("ref")
    assert_same(weights(again.get_base_model()), tuned)


def test_another_adapter_with_the_same_config_starts_empty(tmp_path):
    """Room for a copy is made for TRL's reference only."""
    config = DSTConfig(epsilon=0.02)
    model = get_peft_model(llama(), config)
    sft(model, tmp_path, max_steps=1)
    model.state_dict()  # brings the records up to date
    model.add_adapter("other", config)
    model.add_adapter("ref", DSTConfig(epsilon=0.02))
    sizes = {n: p.numel() for n, p in model.named_parameters() if "dst_values" in n}
    assert sum(size for name, size in sizes.items() if ".default." in name) == model.constraint().budget
    assert not any(size for name, size in sizes.items() if ".other." in name or ".ref." in name)


def test_reward_models(tmp_path):
    classify = hf.LlamaForSequenceClassification
    base = llama(classify, num_labels=1)
    seed = weights(base)

    def train(model, **options):
        trainer = trl.RewardTrainer(
            model,
            args=arguments(trl.RewardConfig, tmp_path),
            train_dataset=Dataset.from_dict(PAIRS),
            processing_class=tokenizer(),
            **options,
        )
        trainer.train()
        return trainer

    config = DSTConfig(epsilon=0.02, task_type="SEQ_CLS", modules_to_save=["score"])
    trainer = train(base, peft_config=config)
    found = losses(trainer)
    assert found[-1] < found[0]
    del seed["score.weight"]
    assert differing(trainer.model, seed) == trainer.model.constraint().budget
    twin = twin_of(trainer, classify)
    assert found == losses(train(twin.model, callbacks=[Project(twin)]))
    head = trainer.model.get_base_model().score.modules_to_save["default"].weight
    assert torch.equal(head, twin.model.score.weight)


def test_grpo_refers_to_the_seed(tmp_path):
    base = llama()
    seed = weights(base)

    def cats(completions, **unused):
        return [float(text.count("cat")) - 0.1 * len(text.split()) for text in completions]

    trainer = trl.GRPOTrainer(
        base,
        reward_funcs=cats,
        args=arguments(
            trl.GRPOConfig,
            tmp_path,
            num_generations=4,
            per_device_train_batch_size=8,
            max_completion_length=6,
            max_steps=3,
            beta=0.1,
        ),
        train_dataset=Dataset.from_dict({"prompt": ["the cat", "a dog"] * 8}),
        processing_class=tokenizer(),
        peft_config=DSTConfig(epsilon=0.02),
    )
    trainer.train()
    kl = [entry["kl"] for entry in trainer.state.log_history if "kl" in entry]
    assert kl[0] == 0
    assert kl[-1] > 0
    assert differing(trainer.model, seed) == trainer.model.constraint().budget
    with trainer.model.disable_adapter():
        assert_same(weights(trainer.model.get_base_model()), seed)


def test_tokens_that_a_chat_template_brings_must_be_there_before(tmp_path):
    """TRL would have their rows trained densely, by an option that DST does not have."""
    source = llama(), tokenizer()
    source[1].add_tokens(["<|turn|>"])
    source[1].chat_template = "{% for m in messages %}<|turn|>{{ m['content'] }}{% endfor %}"
    source[1].save_pretrained(tmp_path / "chat")
    base = llama()
    with pytest.raises(ValueError, match=r"trainable_token_indices=.*clone_chat_template.*modules_to_save"):
        sft(base, tmp_path, chat_template_path=str(tmp_path / "chat"), trainer_options={"peft_config": DSTConfig()})

    def grown():
        model, words, added = trl.clone_chat_template(llama(), tokenizer(), str(tmp_path / "chat"))
        assert added
        return model, words

    base, words = grown()
    seed = weights(base)
    config = DSTConfig(epsilon=0.02, modules_to_save=["embed_tokens", "lm_head"])
    trainer = sft(base, tmp_path, processing_class=words, trainer_options={"peft_config": config})
    del seed["model.embed_tokens.weight"], seed["lm_head.weight"]
    assert differing(trainer.model, seed) == trainer.model.constraint().budget
    trainer.save_model(str(tmp_path / "adapter"))
    inputs = {"input_ids": torch.tensor([[1, 4, len(words) - 1, 6]])}
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(grown()[0], tmp_path / "adapter")
    assert torch.equal(loaded(**inputs).logits, trainer.model.eval()(**inputs).logits)


def test_sft_on_a_real_model(data_folder, tmp_path):
    folder = data_folder / "models" / "stories260K"
    if not folder.is_dir():
        pytest.skip("PEFT_DST_DATA has no models/stories260K (a small pretrained Llama)")
    words = hf.AutoTokenizer.from_pretrained(folder)
    words.pad_token = words.pad_token or words.eos_token
    base = hf.AutoModelForCausalLM.from_pretrained(folder)
    seed = weights(base)
    texts = [f"The robot said: {word} is what I like best of all." for word in ("rain", "soup", "tin", "the sea")] * 8
    trainer = sft(
        base,
        tmp_path,
        texts,
        words,
        {"peft_config": DSTConfig(epsilon=1e-2)},
        learning_rate=1e-2,
    )
    assert losses(trainer)[-1] < 0.7 * losses(trainer)[0]
    assert differing(trainer.model, seed) == trainer.model.constraint().budget
    trainer.save_model(str(tmp_path / "adapter"))
    loaded = PeftModel.from_pretrained(hf.AutoModelForCausalLM.from_pretrained(folder), tmp_path / "adapter")
    assert_same(weights(loaded.get_base_model()), weights(trainer.model.get_base_model()))
