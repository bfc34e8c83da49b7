import os

import pytest
import torch
from safetensors import safe_open
from torch import nn

from peft_dst.subsets import load_scores, save_scores, score_parameters
from peft_dst.subsets.cache import checksum
from tests.models import assert_same
from tests.subsets.test_gradients import bert_batches


DEFINITIONS = ["per_example", "per_batch"]


class Interruption(Exception):
    pass


def interrupted(batches, after, error=Interruption):
    """A dataloader that fails when it is asked for one batch more."""
    yield from batches[:after]
    raise error


def untouched(model, batch):
    pytest.fail("something was computed")


def metadata(path):
    with safe_open(path, framework="pt") as file:
        return file.metadata()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "scores.safetensors"


@pytest.mark.parametrize("definition", DEFINITIONS)
@pytest.mark.parametrize(
    ("save_every", "kept"), [(1, 8), (3, {"per_example": 6, "per_batch": 8}), (5, {"per_example": 5})]
)
@pytest.mark.parametrize("error", [Interruption, KeyboardInterrupt])
def test_interrupted_and_resumed_equals_uninterrupted(build, path, definition, save_every, kept, error):
    """Batches of four, two of which come through; per batch a write waits for the end of one."""
    kept = kept.get(definition, 8) if isinstance(kept, dict) else kept
    options = {"definition": definition, "save_every": save_every, "progress": False}
    wanted = score_parameters(build("bert"), bert_batches(), **options)
    with pytest.raises(error):
        score_parameters(build("bert"), interrupted(bert_batches(), 2, error), cache=path, **options)
    assert metadata(path)["examples"] == str(kept)
    calls = []

    def loss(model, batch):
        calls.append(len(batch["labels"]))
        return model(**batch).loss

    scores = score_parameters(build("bert"), bert_batches(), loss=loss, cache=path, **options)
    assert sum(calls) == 12 - kept
    assert_same(scores, wanted)
    assert_same(load_scores(path), wanted)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_an_example_that_fails_is_not_half_counted(build, path):
    """Some gradients of the fourth example are in the sums when its backward pass is stopped; on disk there are none."""
    model, batches = build("bert"), bert_batches()
    calls = []

    def loss(model, batch):
        calls.append(1)
        value = model(**batch).loss
        if len(calls) == 4:
            hidden = model.bert.embeddings.word_embeddings.weight
            # Fails in the last part of the backward pass.
            handle = hidden.register_hook(lambda _: (_ for _ in ()).throw(Interruption))
            handles.append(handle)
        return value

    handles = []
    options = {"cache": path, "save_every": 2, "progress": False}
    with pytest.raises(Interruption):
        score_parameters(model, batches, loss=loss, **options)
    handles[0].remove()
    assert metadata(path)["examples"] == "2"
    assert_same(score_parameters(model, batches, **options), score_parameters(model, batches, progress=False))


def test_a_complete_cache_is_loaded(build, path):
    scores = score_parameters(build("bert"), bert_batches(), cache=path, progress=False)
    written = path.stat().st_mtime_ns
    again = score_parameters(build("bert"), bert_batches(), loss=untouched, cache=str(path), progress=False)
    assert_same(scores, again)
    assert list(scores) == list(again)
    assert path.stat().st_mtime_ns == written
    expected = {"definition": "per_example", "max_examples": "None", "examples": "12", "complete": "true"}
    assert metadata(path).items() >= expected.items()
    assert metadata(path)["weights"] == checksum(build("bert"))


def test_stopped_behind_the_last_example(build, path, monkeypatch):
    """All is done but the last write: nothing is left to compute, and the mean is taken once."""
    options = {"cache": path, "save_every": 12, "progress": False}
    replace, calls = os.replace, []

    def failing(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise Interruption
        replace(*arguments)

    monkeypatch.setattr("os.replace", failing)
    with pytest.raises(Interruption):
        score_parameters(build("bert"), bert_batches(), **options)
    monkeypatch.undo()
    assert metadata(path)["complete"] == "false"
    scores = score_parameters(build("bert"), bert_batches(), loss=untouched, **options)
    assert_same(scores, score_parameters(build("bert"), bert_batches(), progress=False))


def test_an_unfinished_cache_is_no_file_of_scores(build, path):
    with pytest.raises(Interruption):
        score_parameters(build("bert"), interrupted(bert_batches(), 1), cache=path, save_every=1, progress=False)
    with pytest.raises(ValueError, match=r"unfinished sums of 4 examples. Give it to `score_parameters` as `cache`"):
        load_scores(path)


def test_what_was_saved_outlives_a_later_error(build, path):
    batches = bert_batches()
    with pytest.raises(Interruption):
        score_parameters(build("bert"), interrupted(batches, 2), cache=path, save_every=4, progress=False)
    before = path.read_bytes()
    with pytest.raises(KeyboardInterrupt):
        score_parameters(build("bert"), interrupted(batches, 2, KeyboardInterrupt), cache=path, progress=False)
    assert path.read_bytes() == before


@pytest.mark.parametrize("complete", [True, False])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"definition": "per_batch"}, r"definition \(per_example there, per_batch asked for\)"),
        ({"max_examples": 5}, r"max_examples \(None there, 5 asked for\)"),
        ({"names": ["classifier.bias"]}, r"the parameters scored \(for one, 'bert.embeddings.LayerNorm.bias'\)"),
        ({"weights": 1.0}, r"weights \([0-9a-f]{8} there, [0-9a-f]{8} asked for\)"),
        ({"weights": 1.0, "max_examples": 5}, r"max_examples \(.*\); weights \("),
    ],
)
def test_another_pass_is_refused(build, path, change, message, complete):
    batches = bert_batches() if complete else interrupted(bert_batches(), 1)
    try:
        score_parameters(build("bert"), batches, cache=path, save_every=1, progress=False)
    except Interruption:
        assert not complete
    before = path.read_bytes()
    model = build("bert")
    # One that is not scored counts as well.
    model.classifier.bias.data[0] += change.get("weights", 0.0)
    options = {key: value for key, value in change.items() if key != "weights"}
    with pytest.raises(
        ValueError, match=f"belongs to another pass; it differs in {message}.* Use another path, or delete"
    ):
        score_parameters(model, bert_batches(), loss=untouched, cache=path, progress=False, **options)
    assert path.read_bytes() == before


def test_other_batches_are_refused(build, path):
    options = {"cache": path, "save_every": 1, "progress": False}
    with pytest.raises(Interruption):
        score_parameters(build("bert"), interrupted(bert_batches(), 1), definition="per_batch", **options)
    with pytest.raises(ValueError, match=r"ends after 4 examples, inside a batch \(3 to 6\)"):
        score_parameters(build("bert"), bert_batches(3), definition="per_batch", **options)
    with pytest.raises(ValueError, match=r"the cache has 4 examples, the dataloader only 3"):
        score_parameters(build("bert"), bert_batches(3)[:1], definition="per_batch", **options)


def test_example_by_example_batches_may_be_others(build, path):
    options = {"cache": path, "save_every": 1, "progress": False}
    with pytest.raises(Interruption):
        score_parameters(build("bert"), interrupted(bert_batches(), 1), **options)
    scores = score_parameters(build("bert"), bert_batches(3), **options)
    assert_same(scores, score_parameters(build("bert"), bert_batches(), progress=False))


def test_max_examples_is_resumed(build, path):
    options = {"max_examples": 10, "definition": "per_batch", "progress": False}
    with pytest.raises(Interruption):
        score_parameters(build("bert"), interrupted(bert_batches(), 2), cache=path, save_every=1, **options)
    scores = score_parameters(build("bert"), bert_batches(), cache=path, save_every=1, **options)
    assert metadata(path)["examples"] == "10"
    assert_same(scores, score_parameters(build("bert"), bert_batches(), **options))


def test_foreign_files_are_refused(build, path):
    path.write_bytes(b"something else")
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        score_parameters(build("bert"), bert_batches(), cache=path)
    assert path.read_bytes() == b"something else"
    save_scores(path, {"w": torch.ones(1)})
    with pytest.raises(ValueError, match="belongs to another pass; it differs in definition"):
        score_parameters(build("bert"), bert_batches(), cache=path)
    shapes = {name: p.shape for name, p in build("bert").named_parameters()}
    identity = {"definition": "per_example", "max_examples": "None", "weights": checksum(build("bert"))}
    for examples in ("-3", "", "1.5"):
        save_scores(path, {n: torch.ones(s) for n, s in shapes.items()}, {**identity, "examples": examples})
        with pytest.raises(ValueError, match="it differs in form"):
            score_parameters(build("bert"), bert_batches(), cache=path)
    shapes["classifier.bias"] = (1, 3)
    save_scores(path, {n: torch.ones(s) for n, s in shapes.items()}, {**identity, "examples": "4"})
    with pytest.raises(ValueError, match=r"differs in the shape of 'classifier.bias'"):
        score_parameters(build("bert"), bert_batches(), cache=path)


def test_the_checksum_sees_names_values_dtypes_shapes_and_buffers():
    def model(change=lambda m: None):
        one = nn.Linear(2, 2)
        one.weight.data, one.bias.data = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([0.0, -1.0])
        one.register_buffer("count", torch.tensor(3))
        one.register_buffer("none", torch.empty(0))
        change(one)
        return one

    def rename(m):
        m.other = m.bias
        del m.bias

    changes = [
        lambda m: m.bias.data.neg_(),  # 0.0 and −0.0 differ
        lambda m: m.count.add_(1),
        lambda m: setattr(m.bias, "data", m.bias.data[None]),
        lambda m: m.bfloat16(),
        rename,
    ]
    sums = [checksum(model()), *(checksum(model(change)) for change in changes)]
    assert len(set(sums)) == len(sums)
    assert checksum(model()) == sums[0] == "3ce12666"
    assert checksum(model(lambda m: setattr(m.weight, "data", m.weight.data.t().contiguous().t()))) == sums[0]
