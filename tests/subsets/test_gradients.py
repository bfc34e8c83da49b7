import copy
from collections import UserDict

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from peft_dst.subsets import score_parameters
from tests.models import assert_same, batch


class Linear(nn.Module):
    """A linear or logistic model with two inputs."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        return x @ self.weight + self.bias


X = torch.tensor([[1.0, 2.0], [3.0, 0.0], [-1.0, 4.0], [0.5, 1.0]])
Y = torch.tensor([1.0, 0.0, 1.0, 0.0])


def logistic(model, pair):
    return F.binary_cross_entropy_with_logits(model(pair[0]), pair[1])


def squared_error(model, pair):
    return (model(pair[0]) - pair[1]).square().mean() / 2


def pairs(size):
    return list(zip(X.split(size), Y.split(size), strict=True))


def bert_batches(size=4, steps=3):
    """Sentences of different lengths, padded to seven tokens, with attention masks."""
    rows = {name: torch.cat([batch("bert", step)[name] for step in range(steps)]) for name in ("input_ids", "labels")}
    lengths = 3 + torch.arange(len(rows["labels"])) % 5
    rows["attention_mask"] = (torch.arange(7) < lengths[:, None]).long()
    rows["input_ids"] = rows["input_ids"] * rows["attention_mask"]
    parts = {name: tensor.split(size) for name, tensor in rows.items()}
    return [dict(zip(parts, values, strict=True)) for values in zip(*parts.values(), strict=True)]


def llama_batches(size=4, steps=2):
    """Texts of different lengths; the loss leaves the padding out."""
    batches = bert_batches(size, steps)
    for one in batches:
        one["labels"] = one["input_ids"].masked_fill(one["attention_mask"] == 0, -100)
    return batches


BATCHES = {"bert": bert_batches, "llama": llama_batches}


def reference(model, batches, single=True):
    """One backward pass an example (or a batch), nothing shared with the library, sums in float64."""
    model = copy.deepcopy(model).eval()
    parameters = dict(model.named_parameters())
    sums = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in parameters.items()}
    count = 0
    for one in batches:
        n = len(one["labels"])
        parts = [slice(i, i + 1) for i in range(n)] if single else [slice(0, n)]
        for part in parts:
            loss = model(**{name: tensor[part] for name, tensor in one.items()}).loss
            gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
            for name, gradient in zip(parameters, gradients, strict=True):
                if gradient is not None:
                    sums[name] += gradient.double().square() * (1 if single else n)
        count += n
    return {name: (total / count).float() for name, total in sums.items()}


def assert_close(scores, wanted, tolerance):
    """Componentwise, relative to the largest score of the tensor.

    The gradient of a key's bias in BERT is zero on paper (softmax does not see a shift of all logits), so its scores are
    rounding and nothing else, some 1e-20 times the others: they are held against the largest score of all.
    """
    assert scores.keys() == wanted.keys()
    largest = max(score.max().item() for score in wanted.values())
    for name, score in scores.items():
        scale = max(wanted[name].max().item(), 1e-15 * largest)
        assert (score - wanted[name]).abs().max().item() <= tolerance * scale, name


def test_logistic_regression_by_hand():
    """At zero every probability is 1/2: the gradient is ∓ x / 2 for the weight and ∓ 1/2 for the bias."""
    for size in (1, 2, 3, 4):
        scores = score_parameters(Linear(), pairs(size), loss=logistic, progress=False)
        # (1 + 9 + 1 + 1/4) / 16 and (4 + 0 + 16 + 1) / 16.
        assert scores["weight"].tolist() == [0.703125, 1.3125]
        assert scores["bias"].item() == 0.25


def test_linear_regression_by_hand():
    """θ = (1, −1), bias 1/2: residuals −3/2, 7/2, −11/2, 0, and the gradient is residual · x."""
    model = Linear()
    model.weight.data = torch.tensor([1.0, -1.0])
    model.bias.data = torch.tensor(0.5)
    scores = score_parameters(model, pairs(2), loss=squared_error, progress=False)
    # (2.25 + 110.25 + 30.25 + 0) / 4, (9 + 0 + 484 + 0) / 4, (2.25 + 12.25 + 30.25) / 4.
    assert scores["weight"].tolist() == [35.6875, 123.25]
    assert scores["bias"].item() == 11.1875


def test_per_batch_by_hand():
    """Logistic regression at zero: gradients −x/2, x/2, −x/2, x/2."""
    scores = score_parameters(Linear(), pairs(3), loss=logistic, definition="per_batch", progress=False)
    # Means of three: (−1 + 3 + 1) / 6 and (−2 + 0 − 4) / 6, each with weight 3; then the last one's: 1/4 and 1/2.
    first = torch.tensor([3 / 6, -6 / 6]).square()
    assert scores["weight"].tolist() == pytest.approx(
        ((3 * first + torch.tensor([1 / 16, 1 / 4])) / 4).tolist(), rel=1e-6
    )
    assert scores["bias"].item() == pytest.approx((3 * (1 / 6) ** 2 + 1 / 4) / 4, rel=1e-6)


@pytest.mark.parametrize("single", [True, False])
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_equals_single_backward_passes(build, name, single):
    model, batches = build(name), BATCHES[name](3)
    scores = score_parameters(model, batches, definition="per_example" if single else "per_batch", progress=False)
    # The sums of a dozen squares in float32 against float64: some units in the last place (measured: up to 1.9e-7).
    assert_close(scores, reference(model, batches, single), 1e-6)
    assert all(score.dtype == torch.float32 and score.is_cpu and not score.requires_grad for score in scores.values())


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_the_size_of_batches_does_not_matter(build, name):
    """One, three and eight: the same examples in the same order, padded alike, so the very same numbers."""
    model = build(name)
    scores = {size: score_parameters(model, BATCHES[name](size), progress=False) for size in (1, 3, 8)}
    assert_same(scores[1], scores[3])
    assert_same(scores[1], scores[8])


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_padding_changes_rounding_only(build, name):
    """A sentence without its padding has the score of the padded one, where the model is told of it."""
    model, padded = build(name), BATCHES[name](1)
    lengths = [int(one["attention_mask"].sum()) for one in padded]
    cut = [{k: v[:, :n] if v.dim() > 1 else v for k, v in one.items()} for one, n in zip(padded, lengths, strict=True)]
    assert len(set(lengths)) > 2
    # Sums of other lengths round otherwise (measured: up to 1.5e-7).
    assert_close(score_parameters(model, cut, progress=False), score_parameters(model, padded, progress=False), 2e-6)


def test_deterministic_whatever_the_random_state(build):
    model = build("bert")
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    model.train()
    one = score_parameters(model, bert_batches(), progress=False)
    torch.manual_seed(99)
    assert_same(one, score_parameters(model, bert_batches(), progress=False))
    assert model.training


def test_half_precision_weights(build):
    model = build("bert").bfloat16()
    scores = score_parameters(model, bert_batches(), progress=False)
    # bfloat16 gradients, squared and summed in float32: exactly so.
    assert_close(scores, reference(model, bert_batches()), 1e-6)


def test_double_precision_weights(build):
    model = build("bert").double()
    scores = score_parameters(model, bert_batches(), progress=False)
    assert scores["classifier.weight"].dtype == torch.float32
    assert_close(scores, reference(model, bert_batches()), 1e-6)


def test_sparse_gradients():
    torch.manual_seed(0)
    tokens = [torch.tensor([[1, 1, 4]]), torch.tensor([[0, 1, 2]])]
    models = [nn.Embedding(5, 3, sparse=sparse) for sparse in (True, False)]
    models[1].load_state_dict(models[0].state_dict())
    scores = [score_parameters(m, tokens, loss=lambda m, x: m(x).square().sum(), progress=False) for m in models]
    assert_same(*scores)
    # Twice in one example: (2 · 2w)², and once in the other: (2w)².
    assert torch.allclose(scores[0]["weight"][1], models[0].weight[1].detach().square() * 10)


def test_some_names_only(build):
    model = build("bert")
    everything = score_parameters(model, bert_batches(), progress=False)
    names = ["classifier.bias", "bert.embeddings.word_embeddings.weight"]
    seen = []

    def loss(model, batch):
        seen.append([name for name, p in model.named_parameters() if p.requires_grad])
        return model(**batch).loss

    some = score_parameters(model, bert_batches(), loss=loss, names=iter(names), progress=False)
    # In model order.
    assert list(some) == names[::-1]
    assert all(set(one) == set(names) for one in seen)
    assert_same(some, {name: everything[name] for name in some})
    assert_same(score_parameters(model, bert_batches(), names=names[0], progress=False), {names[0]: some[names[0]]})


def test_shared_parameters_are_scored_once(build):
    model = build("gpt2")
    batches = [batch("gpt2")]
    scores = score_parameters(model, batches, progress=False)
    assert "transformer.wte.weight" in scores
    assert "lm_head.weight" not in scores
    # The gradient of both uses together, squared.
    assert_close(scores, reference(model, batches), 1e-6)
    with pytest.raises(ValueError, match=r"'lm_head.weight' is the same parameter as 'transformer.wte.weight'"):
        score_parameters(model, batches, names=["lm_head.weight"])


def test_unused_parameters_score_zero():
    model = nn.ModuleDict({"used": Linear(), "unused": Linear()})
    scores = score_parameters(model, pairs(2), loss=lambda m, pair: logistic(m["used"], pair), progress=False)
    assert scores["unused.weight"].tolist() == [0, 0]
    assert scores["used.bias"] == 0.25


def test_kinds_of_batches(build):
    model = build("bert")
    wanted = score_parameters(model, bert_batches(), progress=False)
    assert_same(wanted, score_parameters(model, [UserDict(b) for b in bert_batches()], progress=False))

    def loss(model, values):
        assert type(values) is tuple
        return model(input_ids=values[0], labels=values[1], attention_mask=values[2]).loss

    assert_same(wanted, score_parameters(model, [list(b.values()) for b in bert_batches()], loss=loss, progress=False))
    # Plain tensors: the loss of each is its own sum.
    line = score_parameters(Linear(), [X[:3], X[3:]], loss=lambda m, x: m(x).sum(), progress=False)
    assert line["weight"].tolist() == X.square().mean(0).tolist()


def test_scalars_and_other_values_are_passed_along(build):
    model = build("bert")
    wanted = score_parameters(model, bert_batches(), progress=False)
    scale = torch.tensor(2.0)

    def loss_of(model, batch):
        assert len(batch["labels"]) == 1
        text, flag, scale = batch.pop("text"), batch.pop("flag"), batch.pop("scale")
        assert (text, flag, scale.dim()) == (["a", "b"], True, 0)
        return model(**batch).loss * scale

    more = [{**b, "text": ["a", "b"], "flag": True, "scale": scale} for b in bert_batches()]
    scores = score_parameters(model, more, loss=loss_of, progress=False)
    # A power of two is exact.
    assert_same(scores, {name: score * 4 for name, score in wanted.items()})


def test_max_examples(build):
    model = build("bert")
    wanted = score_parameters(model, bert_batches(1)[:6], progress=False)
    asked = []

    def batches():
        for i, one in enumerate(bert_batches(4)):
            asked.append(i)
            yield one

    assert_same(wanted, score_parameters(model, batches(), max_examples=6, progress=False))
    assert asked == [0, 1]
    whole = score_parameters(model, [bert_batches(6)[0]], definition="per_batch", progress=False)
    cut = score_parameters(model, bert_batches(8), definition="per_batch", max_examples=6, progress=False)
    assert_same(whole, cut)


def test_one_gradient_is_alive_at_a_time(build):
    """When a parameter's hook has run, no scored parameter has a gradient; also none before the next example."""
    model = build("bert")
    calls, hooked = [], []

    def alive():
        return sum(p.grad is not None for p in model.parameters())

    def loss(model, batch):
        if not calls:
            # Hooks run in the order they were registered: these ones behind the library's.
            hooked.extend(
                p.register_post_accumulate_grad_hook(lambda _: calls.append(alive())) for p in model.parameters()
            )
        assert alive() == 0
        return model(**batch).loss

    score_parameters(model, bert_batches(), loss=loss, progress=False)
    for handle in hooked:
        handle.remove()
    assert len(calls) == 12 * len(list(model.parameters()))
    assert set(calls) == {0}


def state(model):
    return (
        [module.training for module in model.modules()],
        [(p.requires_grad, p.grad) for p in model.parameters()],
        [dict(p._post_accumulate_grad_hooks or {}) for p in model.parameters()],
    )


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_everything_is_put_back(build, error):
    model = build("bert")
    model.train()
    model.bert.encoder.layer[0].eval()
    model.classifier.weight.requires_grad = False
    for parameter in list(model.parameters())[:5]:
        parameter.grad = torch.ones_like(parameter)
    before, values = state(model), {name: p.clone() for name, p in model.named_parameters()}
    calls = []

    def loss(model, batch):
        assert not any(module.training for module in model.modules())
        calls.append(1)
        if error and len(calls) == 3:
            raise error("stop")
        return model(**batch).loss

    if error:
        with pytest.raises(error, match="stop"):
            score_parameters(model, bert_batches(), loss=loss, progress=False)
    else:
        assert score_parameters(model, bert_batches(), loss=loss, progress=False)["classifier.weight"].any()
    after = state(model)
    assert after[0] == before[0]
    assert after[2] == before[2]
    assert all(a[0] == b[0] and a[1] is b[1] for a, b in zip(after[1], before[1], strict=True))
    assert all(p.grad is None or p.grad.eq(1).all() for p in model.parameters())
    assert_same(values, {name: p.detach() for name, p in model.named_parameters()})


def test_under_no_grad(build):
    wanted = score_parameters(build("bert"), bert_batches(), progress=False)
    with torch.no_grad():
        assert_same(wanted, score_parameters(build("bert"), bert_batches(), progress=False))
        assert not torch.is_grad_enabled()


@pytest.mark.parametrize("definition", ["per_example", "per_batch"])
def test_a_loss_that_is_not_finite_is_named(build, definition):
    batches = llama_batches()
    # Nothing to learn from: the mean over no token.
    batches[1]["labels"][:] = -100
    if definition == "per_example":
        batches[1]["labels"][0, 1] = 5
    where = {"per_example": "example 5", "per_batch": "examples 4 to 7"}[definition]
    with pytest.raises(ValueError, match=f"loss of {where} .counted from 0. is nan"):
        score_parameters(build("llama"), batches, definition=definition, progress=False)


def test_gradients_that_are_not_finite_are_refused():
    def loss(model, pair):
        # √0 is finite, its slope is not.
        return (model.weight.sum() * 0).sqrt() + logistic(model, pair)

    with pytest.raises(ValueError, match="'weight' has values from nan"):
        score_parameters(Linear(), pairs(2), loss=loss, progress=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"definition": "exact"}, "unknown definition 'exact': use one of per_example, per_batch"),
        ({"save_every": 0}, "save_every=0"),
        ({"max_examples": 0}, "max_examples=0"),
        ({"names": ["nothing"]}, "no parameter 'nothing'"),
        ({"names": []}, "no parameter to score"),
        ({"loss": None}, "a batch is a tuple, not a mapping: give `loss`"),
        ({"loss": lambda model, batch: model(batch[0]).expand(2)}, r"loss of example 0 is of shape \(2,\)"),
        ({"loss": lambda model, batch: 1.0}, "loss of example 0 is a float"),
        ({"loss": lambda model, batch: torch.ones(())}, "loss of example 0 does not depend on any scored parameter"),
        ({"dataloader": []}, "the dataloader gave no example"),
        ({"dataloader": [(1, 2)]}, "a batch of type tuple has no tensor with a batch dimension"),
        ({"dataloader": [(X, Y[:2])]}, "different first dimensions: {0: 4, 1: 2}"),
        ({"cache": "/nowhere/at/all.safetensors"}, "folder of the cache '/nowhere/at/all.safetensors' does not exist"),
    ],
)
def test_what_cannot_be_scored_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        score_parameters(Linear(), **{"dataloader": pairs(2), "loss": logistic, "progress": False, **options})


def test_a_model_without_a_loss(build):
    without = [{"input_ids": b["input_ids"]} for b in bert_batches()]
    with pytest.raises(ValueError, match=r"output has no loss. Put `labels` into the batches"):
        score_parameters(build("bert"), without, progress=False)


def test_integer_parameters_and_foreign_hooks_are_refused():
    model = Linear()
    model.steps = nn.Parameter(torch.zeros(3, dtype=torch.int64), requires_grad=False)
    assert list(score_parameters(model, pairs(2), loss=logistic, progress=False)) == ["weight", "bias"]
    with pytest.raises(ValueError, match=r"'steps' is torch.int64, which has no gradient"):
        score_parameters(model, pairs(2), loss=logistic, names=["steps"])
    model.bias.register_post_accumulate_grad_hook(lambda _: pytest.fail("a step was taken"))
    with pytest.raises(ValueError, match="'bias' has a hook that waits for its gradient"):
        score_parameters(model, pairs(2), loss=logistic)
    assert score_parameters(model, pairs(2), loss=logistic, names=["weight"], progress=False)["weight"].all()


def test_the_progress_bar(capsys):
    score_parameters(Linear(), pairs(2), loss=logistic, max_examples=3)
    assert "3/3" in capsys.readouterr().err
    score_parameters(Linear(), torch.utils.data.DataLoader(list(zip(X, Y, strict=True)), 3), loss=logistic)
    assert "4/4" in capsys.readouterr().err
    score_parameters(Linear(), pairs(2), loss=logistic, progress=False)
    assert capsys.readouterr().err == ""
