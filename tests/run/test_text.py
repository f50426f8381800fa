from __future__ import annotations

import json
from pathlib import Path

import pytest

from janus_cluster.job.env import render_secrets_env
from janus_cluster.run.paths import RunDir
from janus_cluster.run.text import clean, clean_line, counted, load_secrets, redact, to_json


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred\x1b[0m", "red"),
        ("\x1b]0;title\x07x", "x"),
        ("\x1b]8;;http://evil\x1b\\link\x1b]8;;\x1b\\", "link"),
        ("\x9b31mred", "red"),
        ("\x9d0;title\x9cx", "x"),
        ("\x1bPq#0;2;0\x1b\\x", "x"),
        ("\x1b(0lqk\x1b(B", "lqk"),
        ("\x1bc\x1b7\x1b=x", "x"),
        ("a\bb\x7f\x00\x85\x1b", "ab"),
        ("user\u202egnp.exe\u2066", "usergnp.exe"),
        ("tab\tstays, Ünïcødé 日本 █ too", "tab\tstays, Ünïcødé 日本 █ too"),
        ("torn \udc80 byte", "torn \ufffd byte"),
    ],
)
def test_nothing_that_a_terminal_would_act_on_is_left(text: str, shown: str) -> None:
    assert clean(text) == shown


def test_one_line_stays_one_line() -> None:
    assert clean_line("a\r\nb\nc\u2028d") == "a b cd"


def test_json_is_escaped_and_means_the_same() -> None:
    value = {"reason": "\x1b[31m\x9b2J \u202e ü \x7f"}
    text = to_json(value)
    assert not {c for c in text if c != "\n" and (ord(c) < 32 or 126 < ord(c) < 160 or c == "\u202e")}
    assert "ü" in text
    assert json.loads(text) == value


def test_json_has_no_word_for_nan() -> None:
    text = to_json({"loss": float("nan"), "ranks": [{"wait": float("inf")}, {"wait": 1.5}], "pair": (1, 2.0)})
    assert json.loads(text) == {"loss": None, "ranks": [{"wait": None}, {"wait": 1.5}], "pair": [1, 2.0]}


def test_secrets_of_a_run_are_replaced_by_their_names(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    assert load_secrets(run) == {}
    for number, given in enumerate(
        ({"WANDB_API_KEY": "it's $(x) secret", "SHORT_KEY": "1"}, {"HF_TOKEN": "hf_new"}), 1
    ):
        run.bundle(number).path.mkdir(parents=True)
        run.bundle(number).secrets_env.write_text(render_secrets_env(given))
    secrets = load_secrets(run)
    assert redact("key=it's $(x) secret! 1 hf_new", secrets) == "key=<WANDB_API_KEY>! 1 <HF_TOKEN>"


@pytest.mark.parametrize(
    ("number", "noun", "text"),
    [(1, "rank", "1 rank"), (2, "rank", "2 ranks"), (1, "process", "1 process"), (8, "process", "8 processes"),
     (1.0, "epoch", "1 epoch"), (0.5, "epoch", "0.5 epochs"), (1_250_000, "step", "1250000 steps")],
)  # fmt: skip
def test_one_is_singular(number: float, noun: str, text: str) -> None:
    assert counted(number, noun) == text
