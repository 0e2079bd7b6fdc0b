import sys
from types import SimpleNamespace

import pytest
import torch

from flame.data.tokenizer import Tokenizer
from flame.errors import FlameError
from flame.evaluation.generate import Sampling, generate, load_any
from flame.evaluation.perplexity import evaluate_texts
from flame.evaluation.scoring import Continuation, score, windows
from flame.models import build_model, initialize_weights
from flame.models.hf import export_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf")
    tokenizer = Tokenizer.byte_level()
    model = build_model({"model_type": "gla", "vocab_size": tokenizer.vocab_size, "hidden_size": 32,
                         "num_hidden_layers": 2, "num_heads": 2, "initializer_range": 0.1})  # fmt: skip
    initialize_weights(model, 0)
    export_model(model, folder)
    tokenizer.save(folder)
    return folder


def by_hand(model, context, target):
    ids = torch.tensor([[*context, *target]])
    logprobs = torch.log_softmax(model(ids).logits[0].float(), -1)
    total = sum(logprobs[len(context) - 1 + i, token].item() for i, token in enumerate(target))
    return total, all(logprobs[len(context) - 1 + i].argmax() == token for i, token in enumerate(target))


def test_batched_scores_of_uneven_rows_are_those_of_each_alone_and_in_order(folder):
    model = load_any(folder, "cpu")
    items = [Continuation([5], [6, 7]), Continuation([1, 2, 3, 4, 5, 6], [9]), Continuation([8, 8], [1, 2, 3])]
    greedy = generate(model, [4, 4], Sampling(3, temperature=0))
    items.append(Continuation([4, 4], greedy))
    for item, found in zip(items, score(model, items, batch_size=3)):
        logprob, likely = by_hand(model, item.context, item.target)
        assert found.logprob == pytest.approx(logprob, rel=1e-5) and found.is_greedy == likely
    assert score(model, items)[-1].is_greedy


def test_a_long_context_loses_its_beginning(folder):
    model = load_any(folder, "cpu")
    context = [(i * 7) % 200 for i in range(40)]
    (found,) = score(model, [Continuation(context, [3, 4])], max_length=10)
    assert found.logprob == pytest.approx(by_hand(model, context[-9:], [3, 4])[0], rel=1e-5)


def test_windows_score_every_token_once_after_as_much_as_fits():
    found = [(list(item.context), list(item.target)) for item in windows(range(10), -1, 4)]
    assert found == [([-1], [0, 1, 2, 3]), ([3], [4, 5, 6, 7]), ([5, 6, 7], [8, 9])]


def test_without_lm_eval_benchmark_tasks_say_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    monkeypatch.delitem(sys.modules, "flame.evaluation.harness", raising=False)
    with pytest.raises(FlameError, match="pip install lm_eval"):
        import flame.evaluation.harness  # noqa: F401


def requests(*arguments):
    return [SimpleNamespace(args=each) for each in arguments]


def test_lm_eval_gets_likelihoods_and_texts_from_a_folder(folder):
    pytest.importorskip("lm_eval")
    from flame.evaluation.harness import FlameLM

    lm = FlameLM(folder, batch_size=2, max_length=64)
    tokenizer, model = lm.tokenizer, lm.model
    asked = [("for i in", " range"), ("", "import"), ("a b", " c")]
    for (context, target), (logprob, likely) in zip(asked, lm.loglikelihood(requests(*asked), disable_tqdm=True)):
        given = tokenizer.encode(context) or [tokenizer.require_eos()]
        assert (logprob, likely) == pytest.approx(by_hand(model, given, tokenizer.encode(target)), rel=1e-5)
    (rolling,) = lm.loglikelihood_rolling(requests(("def f(x): return x",)))
    loss = evaluate_texts(model, tokenizer, ["def f(x): return x"])
    assert -rolling == pytest.approx(loss.nats_per_token * loss.tokens, rel=1e-5)
    free, stopped = lm.generate_until(
        requests(("def", {"max_gen_toks": 12}), ("def", {"until": ["zz"], "max_gen_toks": 12}))
    )
    assert stopped == free.split("zz")[0]
    stop = free[3]
    assert lm.generate_until(requests(("def", {"until": [stop], "max_gen_toks": 12}))) == [free.split(stop)[0]]
