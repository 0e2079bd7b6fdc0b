import argparse
import math

import pytest
import torch

from flame.checkpoint.convert import from_hf
from flame.data.tokenizer import Tokenizer
from flame.errors import ConfigError, DataError
from flame.evaluation import generate as generation
from flame.evaluation import perplexity
from flame.evaluation.generate import Sampling, choose, generate, generate_batch, load_any
from flame.evaluation.perplexity import evaluate_texts
from flame.models import build_model, initialize_weights
from flame.models.hf import export_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf")
    tokenizer = Tokenizer.byte_level()
    model = build_model(
        {"model_type": "gla", "vocab_size": tokenizer.vocab_size, "hidden_size": 32, "num_hidden_layers": 2,
         "num_heads": 2, "initializer_range": 0.1, "attn": {"layers": [1], "num_heads": 4}}
    )  # fmt: skip
    initialize_weights(model, 0)
    export_model(model, folder)
    tokenizer.save(folder)
    return folder


def test_cached_greedy_decoding_equals_recomputing_everything(folder):
    model, prompt = load_any(folder, "cpu"), [5, 17, 80, 33]
    added = generate(model, prompt, Sampling(12, temperature=0))
    for _ in range(12):
        prompt.append(int(model(torch.tensor([prompt])).logits[0, -1].argmax()))
    assert added == prompt[4:]


@pytest.mark.parametrize("system", ["gla", "transformer"])
def test_prompts_of_uneven_length_decode_together_as_they_do_alone(system):
    model = build_model({"model_type": system, "vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2,
                         "num_heads": 2, "initializer_range": 0.1})  # fmt: skip
    initialize_weights(model, 0)
    prompts = [[5, 17, 8, 33, 2, 9, 41], [7], [50, 3, 3]]
    alone = [generate(model.eval(), prompt, Sampling(9, temperature=0)) for prompt in prompts]
    assert generate_batch(model, prompts, Sampling(9, temperature=0)) == alone
    stop = alone[1][2]
    until = [added[: added.index(stop) + 1] if stop in added else added for added in alone]
    assert generate_batch(model, prompts, Sampling(9, temperature=0), stop) == until
    short = generate_batch(model, prompts, Sampling(9, temperature=0), is_done=lambda row, added: len(added) > row)
    assert short == [added[: row + 1] for row, added in enumerate(alone)]


def test_generation_ends_at_the_stop_token(folder):
    model = load_any(folder, "cpu")
    added = generate(model, [5, 17], Sampling(10, temperature=0))
    assert generate(model, [5, 17], Sampling(10, temperature=0), stop=added[3]) == added[: added.index(added[3]) + 1]


def test_draws_repeat_with_the_seed_and_stay_among_the_likeliest(folder):
    logits = torch.tensor([0.0, 3.0, 2.0, -1.0])
    drawn = {
        int(choose(logits, Sampling(temperature=1.0, top_k=2), torch.Generator().manual_seed(s))) for s in range(40)
    }
    assert drawn == {1, 2}
    drawn = {int(choose(logits, Sampling(temperature=1.0, top_k=0, top_p=0.5), torch.Generator())) for _ in range(40)}
    assert drawn == {1}
    rows = torch.stack([logits, logits.flip(0)])
    drawn = choose(rows, Sampling(temperature=1.0, top_k=0, top_p=0.8), torch.Generator().manual_seed(0))
    assert drawn.shape == (2,) and drawn[0] in (1, 2) and drawn[1] in (1, 2)
    model = load_any(folder, "cpu")
    assert generate(model, [3], Sampling(20, seed=1)) == generate(model, [3], Sampling(20, seed=1))
    assert generate(model, [3], Sampling(20, seed=1)) != generate(model, [3], Sampling(20, seed=2))


def test_the_loss_of_text_is_the_mean_of_its_tokens_and_windows_do_not_overlap(folder):
    model, tokenizer = load_any(folder, "cpu"), Tokenizer.load(folder)
    text = "for value in range(10): print(value)"
    ids = torch.tensor([[tokenizer.require_eos(), *tokenizer.encode(text)]])
    logits = model(ids[:, :-1]).logits
    expected = torch.nn.functional.cross_entropy(logits[0], ids[0, 1:]).item()
    whole = evaluate_texts(model, tokenizer, [text])
    assert whole.nats_per_token == pytest.approx(expected, rel=1e-5)
    assert whole.bits_per_byte == pytest.approx(expected * whole.tokens / math.log(2) / len(text), rel=1e-5)
    assert evaluate_texts(model, tokenizer, [text], seq_len=7).tokens == whole.tokens
    texts = [text, "x", text * 3, "import os"]
    alone = evaluate_texts(model, tokenizer, texts, seq_len=16, batch_size=1)
    together = evaluate_texts(model, tokenizer, texts, seq_len=16, batch_size=3)
    assert together.tokens == alone.tokens and together.nats_per_token == pytest.approx(alone.nats_per_token, rel=1e-5)
    with pytest.raises(DataError, match="no text"):
        evaluate_texts(model, tokenizer, [])


def test_the_commands_run_on_a_folder_and_on_a_checkpoint(folder, tmp_path, capsys):
    step = from_hf(folder, tmp_path / "checkpoint")
    (tmp_path / "text").write_text("import os")
    for model in (folder, step):
        parser = argparse.ArgumentParser()
        generation.add_arguments(parser)
        assert generation.main(parser.parse_args([str(model), "def f", "--max-new-tokens", "4"])) == 0
        assert capsys.readouterr().out.startswith("def f")
        parser = argparse.ArgumentParser()
        perplexity.add_arguments(parser)
        assert perplexity.main(parser.parse_args([str(model), str(tmp_path / "text")])) == 0
        assert '"bytes": 9' in capsys.readouterr().out


def test_json_lines_are_a_document_each_and_a_bad_line_is_named(folder, tmp_path, capsys):
    file = tmp_path / "texts.jsonl"
    file.write_text('{"text": "abc", "body": "abcd"}\n{"text": "de", "body": "e"}\n')
    assert list(perplexity.read_texts(file)) == ["abc", "de"]
    parser = argparse.ArgumentParser()
    perplexity.add_arguments(parser)
    assert perplexity.main(parser.parse_args([str(folder), str(file), "--key", "body"])) == 0
    assert '"bytes": 5' in capsys.readouterr().out
    file.write_text('{"text": "abc"}\n{"other": 1}\n')
    with pytest.raises(DataError, match="line 2"):
        list(perplexity.read_texts(file))
    with pytest.raises(DataError, match="not both"):
        perplexity.main(parser.parse_args([str(folder)]))


def test_impossible_sampling_is_refused():
    with pytest.raises(ConfigError, match="top_p"):
        Sampling(top_p=0.0)
