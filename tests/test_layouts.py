"""Where tensors have their samples, where sizes do not tell: served as one sample at a time, or refused by name."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from peft_dst.mixing.batch import Batch
from peft_dst.mixing.layouts import compare
from tests.test_mixed import NAMES, check, inputs, one_by_one, with_adapters


SMALL = {"vocab_size": 61, "d_model": 16}
SELECTED = "selected by their values"
ELSEWHERE = "does not get its samples along the first dimension"


def ids(rows: int, length: int) -> Tensor:
    return torch.randint(3, 59, (rows, length))


def bart(kind=hf.BartForConditionalGeneration, config=hf.BartConfig) -> nn.Module:
    torch.manual_seed(0)
    heads = {f"{part}_{what}": 2 for part in ("encoder", "decoder") for what in ("layers", "attention_heads")}
    widths = {"encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_position_embeddings": 40, "dropout": 0.0}
    return kind(config(**SMALL, **heads, **widths, forced_eos_token_id=None)).double()


def switch() -> nn.Module:
    config = hf.SwitchTransformersConfig(
        **SMALL, d_kv=8, d_ff=32, num_layers=2, num_decoder_layers=2, num_heads=2, num_experts=2, expert_capacity=64,
        num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, decoder_start_token_id=0, dropout_rate=0.0,
    )  # fmt: skip
    model = hf.SwitchTransformersForConditionalGeneration(config).double()
    for name, module in model.named_modules():
        if name.endswith("router"):
            # It reckons in float32, whatever the weights are.
            module.dtype = torch.float64
    return model


def llava() -> nn.Module:
    text = hf.LlamaConfig(
        vocab_size=61, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    vision = hf.CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    config = hf.LlavaConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=60,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    return hf.LlavaForConditionalGeneration(config).double()


PAIR, FOUR = ["a", "b"], ["a", "b", "__base__", "a"]


# As many samples as tokens, or as positions with the two that BART keeps free, or neither.
@pytest.mark.parametrize(
    ("kind", "names", "length"),
    [
        *(("bart", names, length) for names in (PAIR, FOUR) for length in (2, 3, 4, 5)),
        *(("mbart", names, length) for names, length in ((PAIR, 2), (FOUR, 2), (FOUR, 4))),
    ],
)
def test_positions_that_all_samples_have_in_common(kind, names, length):
    base = bart() if kind == "bart" else bart(hf.MBartForConditionalGeneration, hf.MBartConfig)
    model = with_adapters(base, "a", "b")
    check(model, names, lambda **kwargs: model(**kwargs).logits, input_ids=ids(len(names), length))


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("length", [2, 4, 5])
def test_beams_of_learned_positions(length, cache):
    model = with_adapters(bart(), "a", "b")
    tokens = ids(2, length)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "num_beams": 2, "use_cache": cache}

    def generate(at: slice, **more):
        mask = torch.ones_like(tokens[at])
        return model.generate(input_ids=tokens[at], attention_mask=mask, **options, **more)

    wanted = one_by_one(model, ["a", "b"], lambda i: generate(slice(i, i + 1)))
    assert torch.equal(generate(slice(None), adapter_names=["a", "b"]), wanted)


@pytest.mark.parametrize("length", [3, 4, 7])
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5"])
def test_as_many_samples_as_tokens_padded_or_not(build, name, length):
    model = with_adapters(build(name).double(), "a", "b")
    tokens = {key: tensor[:, :length] if tensor.dim() == 2 else tensor for key, tensor in inputs(name).items()}
    tokens.pop("attention_mask", None)
    check(model, NAMES, lambda **kwargs: model(**kwargs).logits, **tokens)
    mask = torch.ones_like(tokens["input_ids"])
    mask[1:, -1] = 0
    check(model, NAMES, lambda **kwargs: model(**kwargs).logits, **tokens, attention_mask=mask)


def test_towers_of_images_and_texts():
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**tower, "vocab_size": 61, "max_position_embeddings": 20, "eos_token_id": 1, "bos_token_id": 0}
    vision = {**tower, "image_size": 8, "patch_size": 4}
    config = hf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    model = with_adapters(hf.CLIPModel(config).double(), "a", "b")
    pixels = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    for length in (4, 5):
        for part in ("text_embeds", "image_embeds"):
            given = {"input_ids": ids(4, length), "pixel_values": pixels}
            check(model, NAMES, lambda part=part, **kwargs: getattr(model(**kwargs), part), **given)


def test_classifiers_of_a_token_that_is_found_by_its_value():
    model = with_adapters(bart(hf.BartForSequenceClassification), "a", "b")
    for length in (3, 5):
        tokens = torch.cat([ids(4, length), torch.full((4, 1), 2)], 1)
        check(model, NAMES, lambda **kwargs: model(**kwargs).logits, input_ids=tokens)


class SequenceFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.inner(hidden.transpose(0, 1)).transpose(0, 1)


class Sorted(SequenceFirst):
    """As recurrent layers over packed sequences do: the longest sample first."""

    def forward(self, hidden: Tensor) -> Tensor:
        order = hidden.sum((1, 2)).argsort()
        return self.inner(hidden[order] * 1.0)[order.argsort()]


class SortedLater(SequenceFirst):
    """Of one module's calls the first gets the samples in their places."""

    def forward(self, hidden: Tensor) -> Tensor:
        order = hidden.sum((1, 2)).argsort()
        return self.inner(hidden) + self.inner(hidden[order] * 1.0)[order.argsort()]


@pytest.mark.parametrize("length", [1, 4, 5])
@pytest.mark.parametrize(("kind", "why"), [(SequenceFirst, ELSEWHERE), (Sorted, SELECTED), (SortedLater, SELECTED)])
def test_samples_in_other_places_are_refused(kind, why, length):
    model = with_adapters(kind().double(), "a", "b")
    for rows in (torch.arange(4.0).flip(0), torch.randn(4)):
        hidden = rows[:, None, None].expand(4, length, 8).double()
        with pytest.raises(ValueError, match=f"'inner' .*{why}.*call the model with one adapter at a time"):
            model(hidden, adapter_names=NAMES)


def longformer() -> nn.Module:
    config = hf.LongformerConfig(
        vocab_size=61, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        attention_window=4, max_position_embeddings=70, pad_token_id=1,
    )  # fmt: skip
    return hf.LongformerModel(config).double()


def xlnet() -> nn.Module:
    config = hf.XLNetConfig(vocab_size=61, d_model=16, n_layer=1, n_head=2, d_inner=32, dropout=0.0)
    return hf.XLNetLMHeadModel(config).double()


@pytest.mark.parametrize(
    ("make", "targets", "name", "lengths"),
    [
        (longformer, None, r"attention\.self\.query", (4, 8)),
        (xlnet, ["layer_1", "layer_2"], r"ff\.layer_1", (4, 5)),
    ],
    ids=["longformer", "xlnet"],
)
def test_models_that_turn_their_samples_around_are_refused(make, targets, name, lengths):
    model = with_adapters(make(), "a", "b", target_modules=targets)
    for length in lengths:
        with pytest.raises(ValueError, match=rf"'\S*{name}' .*{ELSEWHERE}"):
            model(input_ids=ids(4, length), adapter_names=NAMES)


def test_funnel_is_refused_whatever_its_pooled_lengths_are():
    torch.manual_seed(0)
    config = hf.FunnelConfig(
        vocab_size=61, d_model=16, n_head=2, d_head=8, d_inner=32, block_sizes=[1, 1], num_decoder_layers=1
    )
    model = with_adapters(hf.FunnelForTokenClassification(config).double(), "a", "b")
    for length in (4, 6, 8):
        with pytest.raises(ValueError, match=rf"\(FunnelRelMultiheadAttention\) .*{SELECTED}"):
            model(input_ids=ids(3, length), adapter_names=["a", "b", "__base__"])


def test_an_expert_is_refused_whenever_it_is_called_and_served_when_it_is_not():
    torch.manual_seed(0)
    base = switch()
    name = next(name for name, _ in base.named_modules() if name.endswith("expert_0.wi"))
    model = with_adapters(base, "a", "b", target_modules=[name])
    tokens: list[int] = []
    model.get_base_model().get_submodule(name).register_forward_pre_hook(lambda _, args: tokens.append(len(args[0])))
    refused: set[int] = set()
    for length in [2] * 40 + [1] * 40:
        given = {"input_ids": ids(4, length), "decoder_input_ids": ids(4, length)}
        tokens.clear()
        with torch.no_grad():
            seed = model(**given, adapter_names=["__base__"] * 4).logits
        if tokens:
            with pytest.raises(ValueError, match=SELECTED):
                model(**given, adapter_names=NAMES)
            refused.update(tokens)
        else:
            assert torch.equal(model(**given, adapter_names=NAMES).logits, seed)
    assert {1, 3, 4, 5} <= refused


@pytest.mark.parametrize("length", [1, 4, 5])
def test_what_is_beside_experts_is_served(length):
    model = with_adapters(switch(), "a", "b", exclude_modules=["mlp"])
    tokens = {"input_ids": ids(4, length), "decoder_input_ids": ids(4, length)}
    check(model, NAMES, lambda **kwargs: model(**kwargs).logits, **tokens)


@pytest.mark.parametrize("length", [2, 11])
def test_an_image_for_each_sample_or_none(length):
    """Four patches and a class token: five placeholders an image."""
    model = with_adapters(llava(), "a", "b")
    pixels = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    for images in ([1, 1], [2, 0], [0, 2], [1, 1]):
        tokens = ids(2, 10 + length)
        for row, count in enumerate(images):
            tokens[row, : 5 * count] = 60
        given = {"input_ids": tokens, "pixel_values": pixels}
        if images == [1, 1]:
            check(model, ["a", "b"], lambda **kwargs: model(**kwargs).logits, **given)
            continue
        for call in (model, model.generate):
            with pytest.raises(ValueError, match=r"2 images .* not one for each.*give each sample one, or call"):
                call(**given, adapter_names=["a", "b"])
        # One adapter for all has nothing to tell apart.
        model(**given, adapter_names=["a", "a"])


def test_patches_that_are_as_many_as_samples_and_texts_without_images():
    model = with_adapters(llava(), "a", "b")
    tokens = ids(4, 5)
    tokens[0] = 60
    with pytest.raises(ValueError, match=r"4 images \(or the like, \(4, 12\)\)"):
        model(tokens, pixel_values=torch.randn(4, 12), adapter_names=NAMES)
    embeddings = model.get_input_embeddings()(ids(4, 5)).detach()
    check(model, NAMES, lambda **kwargs: model(**kwargs).logits, inputs_embeds=embeddings)


def test_a_model_is_tried_once(build, monkeypatch):
    tried: list[int] = []
    original = Batch._try
    monkeypatch.setattr(Batch, "_try", lambda self: (tried.append(self.rows), original(self))[1])
    model = with_adapters(build("bert").double(), "a", "b")
    for length in (3, 4, 7):
        model(inputs("bert")["input_ids"][:, :length], adapter_names=NAMES)
    assert tried == [4]


class Particular(SequenceFirst):
    """A model for batches of four."""

    def forward(self, hidden: Tensor) -> Tensor:
        return self.inner(hidden.view(4, -1, 8))


def test_a_model_that_fails_with_a_sample_more_is_refused():
    model = with_adapters(Particular(), "a", "b")
    with pytest.raises(ValueError, match=r"'inner' .* not known, as the model fails with one more \(shape '\[4"):
        model(torch.randn(4, 3, 8), adapter_names=NAMES)


def test_compare():
    def shapes(*calls):
        return [[torch.Size(shape) for shape in call] for call in calls]

    assert compare(shapes([(4, 4), (4,)]), shapes([(5, 4), (4,)]), 4) == (True, False)
    assert compare(shapes([(4, 4)]), shapes([(4, 5)]), 4) == (None,)
    assert compare(shapes([(8, 4)]), shapes([(10, 4)]), 4) == (None,)
    # Contradicting, or as many calls as samples.
    assert compare(shapes([(4, 2)], [(4, 2)]), shapes([(5, 2)], [(4, 2)]), 4) == (None,)
    assert compare(shapes([(1, 2)]), shapes([(1, 2)], [(1, 2)]), 4) == (None,)
