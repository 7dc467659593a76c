"""Continuations: the tokens that full forward passes would choose, as text that never has to be retracted."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from pretrain.commands.generate import texts_of
from pretrain.inference.generate import Sampling, TextStream, codec_of, generate, sample
from pretrain.model.kv_cache import KVCache
from pretrain.model.transformer import LlamaConfig, Transformer
from pretrain.topology import Topology
from shards import ConfigError, Tokenizer
from tests.vocabularies import byte_fallback_json, foreign_pieces

TOKENIZER = Tokenizer(Path("shards/sample/tokenizer-4k.model"))
CODEC = codec_of(TOKENIZER, bos=True)


def new_cache(max_length: int) -> KVCache:
    return KVCache(1, max_length)


def ids_of(text: str) -> list[int]:
    return TOKENIZER.encode(text)


def streamed(prompt: list[int], ids: list[int], stop: tuple[str, ...] = ()) -> list[str]:
    stream, parts = TextStream(CODEC, prompt, stop), []
    for token_id in ids:
        parts.append(stream.add(token_id))
        if stream.stopped:
            return parts
    return [*parts, stream.rest()]


def test_greedy_tokens_are_those_of_full_forward_passes(topology: Topology) -> None:
    model = Transformer(LlamaConfig(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=4096, init_std=0.3))
    model.initialize(seed=1)

    def next_logits(tokens: torch.Tensor, cache: KVCache) -> torch.Tensor:
        return model(tokens, cache=cache)[:, -1]

    with torch.no_grad():
        how = (model.config.new_cache, 64, CODEC, "Once", Sampling(max_tokens=20, temperature=0), topology)
        text = "".join(generate(next_logits, *how))
        ids = CODEC.encode("Once")
        prompt = len(ids)
        for _ in range(20):
            tokens = torch.tensor([ids])
            ids.append(int(model(tokens, torch.ones_like(tokens))[0, -1].argmax()))
    assert TOKENIZER.eos_id not in ids, "this seed should give a continuation that does not end"
    assert text == TOKENIZER.decode(ids)[len(TOKENIZER.decode(ids[:prompt])) :]


def test_streamed_text_equals_text_decoded_at_the_end() -> None:
    generator = random.Random(3)
    for _ in range(200):
        # Ids below 259 are bytes, most of them parts of no character.
        ids = [generator.choice([generator.randrange(3, 259), generator.randrange(259, 4096)]) for _ in range(12)]
        prompt, new = ids[:3], ids[3:]
        expected = TOKENIZER.decode(ids)[len(TOKENIZER.decode(prompt)) :]
        assert "".join(streamed(prompt, new)) == expected


@pytest.mark.parametrize("kind", ["SentencePiece", "tokenizer.json"])
@pytest.mark.parametrize("end", ["née 你", "မြန်မာဘာသာစကား", "\ufffd" * 40], ids=["mixed", "bytes", "replaced"])
def test_the_text_after_a_long_prompt_is_decoded_with_its_end_alone(
    topology: Topology, tmp_path: Path, end: str, kind: str
) -> None:
    tokenizer = TOKENIZER
    if kind == "tokenizer.json":
        tokenizer = Tokenizer(byte_fallback_json(tmp_path / kind), bos=False, eos=False)
    decoded: list[int] = []
    following: list[int] = []

    def decode(ids: Sequence[int]) -> str:
        decoded.append(len(ids))
        return tokenizer.decode(ids)

    def next_logits(tokens: torch.Tensor, cache: KVCache) -> torch.Tensor:
        return torch.eye(tokenizer.vocab_size)[[following.pop(0)]]

    codec = dataclasses.replace(codec_of(tokenizer, bos=False), decode=decode)
    for more in range(5):  # so that the context's first token is now the first of a character and now another
        prompt, text = "Once upon a time, " * 40 + end + "x" * more, "好 😀 cat"
        context = len(tokenizer.encode(prompt))
        following[:] = tokenizer.encode(prompt + text)[context:]
        sampling = Sampling(max_tokens=len(following), temperature=0)
        found = "".join(generate(next_logits, new_cache, 1 << 12, codec, prompt, sampling, topology))
        assert found == text, more
        assert max(decoded) < 80 < context, "not the whole prompt again for each token"


def test_a_character_of_several_bytes_is_streamed_whole() -> None:
    ids = ids_of("a 你好 😀 née")
    assert len(ids) > 12, "spelled in bytes"
    parts = streamed(ids_of("x"), ids)
    assert "".join(parts) == "a 你好 😀 née"
    assert "\ufffd" not in "".join(parts[:-1])
    assert parts[0] == "a", "what is certain is not held back"


def test_the_space_after_the_prompt_is_kept() -> None:
    assert "".join(streamed(ids_of("The"), ids_of(" cat sat"))) == " cat sat"


@pytest.mark.parametrize(("stop", "expected"), [(("sat",), "the cat "), (("mat", "cat"), "the "), (("dog",), None)])
def test_text_ends_before_a_stop_string_and_shows_no_part_of_it(stop: tuple[str, ...], expected: str | None) -> None:
    text = "the cat sat on a mat, the c"
    parts = streamed([], ids_of(text), stop)
    assert "".join(parts) == (text if expected is None else expected)


def test_sampling_keeps_to_the_likely_tokens() -> None:
    logits = torch.tensor([0.5, 0.2, 0.25, 0.05]).log()

    def drawn(**values: object) -> dict[int, float]:
        sampling = Sampling.model_validate({"temperature": 1.0} | values)
        generator = torch.Generator().manual_seed(1)
        found = [sample(logits, sampling, generator) for _ in range(2000)]
        return {token: found.count(token) / len(found) for token in sorted(set(found))}

    assert drawn() == pytest.approx({0: 0.5, 1: 0.2, 2: 0.25, 3: 0.05}, abs=0.03)
    assert drawn(top_k=2) == pytest.approx({0: 2 / 3, 2: 1 / 3}, abs=0.03)
    assert drawn(top_p=0.74) == pytest.approx({0: 2 / 3, 2: 1 / 3}, abs=0.03)  # 0.5 alone does not reach it
    assert drawn(top_p=0.76) == pytest.approx({0: 0.5 / 0.95, 1: 0.2 / 0.95, 2: 0.25 / 0.95}, abs=0.03)
    assert drawn(temperature=0.5) == pytest.approx({0: 0.704, 1: 0.113, 2: 0.176, 3: 0.007}, abs=0.03)
    assert drawn(temperature=0) == {0: 1.0}
    assert drawn(top_p=0.01) == {0: 1.0}


def test_a_seed_draws_the_same_text_again(topology: Topology) -> None:
    model = Transformer(LlamaConfig(dim=32, n_layers=1, n_heads=4, vocab_size=4096))
    model.initialize(seed=1)

    @torch.no_grad()
    def continued(seed: int) -> str:
        sampling = Sampling(max_tokens=8, seed=seed)
        how = (new_cache, 64, CODEC, "It", sampling, topology)
        return "".join(generate(lambda tokens, cache: model(tokens, cache=cache)[:, -1], *how))

    assert continued(1) == continued(1) != continued(2)


def test_memory_grows_with_the_continuation_and_not_with_the_context(
    topology: Topology, caplog: pytest.LogCaptureFixture
) -> None:
    lengths = []

    def next_logits(tokens: torch.Tensor, cache: KVCache) -> torch.Tensor:
        lengths.append(cache.max_length)
        return torch.arange(4096.0).unsqueeze(0)

    prompt = "Once upon a time"
    tokens = len(CODEC.encode(prompt))
    list(generate(next_logits, new_cache, 1 << 17, CODEC, prompt, Sampling(max_tokens=3, temperature=0), topology))
    list(generate(next_logits, new_cache, tokens + 2, CODEC, prompt, Sampling(max_tokens=3, temperature=0), topology))
    assert lengths == [tokens + 3] * 3 + [tokens + 2] * 2
    assert list(generate(next_logits, new_cache, tokens, CODEC, prompt, Sampling(), topology)) == []
    assert f"the prompt's {tokens} tokens fill the context of {tokens}" in caplog.text


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_beyond_the_vocabulary_are_never_chosen(topology: Topology, temperature: float) -> None:
    def next_logits(tokens: torch.Tensor, cache: KVCache) -> torch.Tensor:
        logits = torch.zeros(1, TOKENIZER.vocab_size + 128)
        logits[:, TOKENIZER.encode("word")] = 20.0
        logits[:, TOKENIZER.vocab_size :] = 40.0  # as untrained rows of a padded embedding may be
        return logits

    sampling = Sampling(max_tokens=8, temperature=temperature)
    assert "word" in "".join(generate(next_logits, new_cache, 64, CODEC, "A", sampling, topology))


def test_a_prompt_that_the_tokenizer_cannot_spell_is_reported(
    topology: Topology, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    codec = codec_of(Tokenizer(foreign_pieces(tmp_path / "named.model")), bos=False)

    def next_logits(tokens: torch.Tensor, cache: KVCache) -> torch.Tensor:
        return torch.arange(float(codec.size)).unsqueeze(0)

    sampling = Sampling(max_tokens=1, temperature=0)
    list(generate(next_logits, new_cache, 64, codec, "the", sampling, topology))
    assert "cannot spell" not in caplog.text
    list(generate(next_logits, new_cache, 64, codec, "the cat", sampling, topology))
    assert "the tokenizer cannot spell a part of the prompt" in caplog.text


def test_a_file_is_a_prompt_as_it_is_or_refused_by_name(tmp_path: Path) -> None:
    text = "One line,\r\nanother\u2028and\n\na last.\n"
    (tmp_path / "good.txt").write_bytes(text.encode())
    (tmp_path / "bad.txt").write_bytes(b"caf\xe9")
    assert texts_of([tmp_path / "good.txt"] * 2) == [text, text]
    with pytest.raises(ConfigError, match=r"--prompt-file=.*bad\.txt is not UTF-8 at byte 3"):
        texts_of([tmp_path / "good.txt", tmp_path / "bad.txt"])
    with pytest.raises(ConfigError, match=r"--prompt-file=.*none\.txt: No such file"):
        texts_of([tmp_path / "none.txt"])
