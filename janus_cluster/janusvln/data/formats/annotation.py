"""Upstream's annotation: records that are conversations.

    {"id", "conversations": [{"from": "human", "value": "...<image>..."}, {"from": "gpt", "value": "MOVE_FORWARD"}],
     "images": [..., current]}

The prompt is the conversation's own, without the line end behind an image, as upstream tokenises it. The target is the
plain action, or the four parts where the answer has them.
"""

from __future__ import annotations

import re

from janus_cluster.janusvln.data.formats.json_samples import record_episode, record_images, record_name
from janus_cluster.janusvln.data.formats.source import BadUnitError, Record, Source
from janus_cluster.janusvln.data.samples import judge_text
from janus_cluster.janusvln.data.store import Collector

IMAGE_TAG = "<image>"
SPEAKERS = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt"}
FOUR_PARTS = re.compile(
    r"\s*SUBINSTRUCTION:(.*?)\n\s*2D_DESCRIPTION:(.*?)\n\s*3D_DESCRIPTION:(.*?)\n\s*ACTION:(.*)", re.DOTALL
)


def claims(record: Record) -> bool:
    """Has it a conversation?"""
    return "conversations" in record


def read_record(source: Source, record: Record, label: str, collector: Collector) -> None:
    """The record is one sample. Raises: BadUnitError, UnknownActionError."""
    question, answer = _turns(record["conversations"])
    images = record_images(source, record)
    tags = question.count(IMAGE_TAG)
    if tags != len(images):
        raise BadUnitError(f"{tags} {IMAGE_TAG} in the conversation but {len(images)} images")
    texts, action = _parse_answer(source, answer)
    name = record_name(record, label)
    collector.sample(
        id=name,
        episode=record_episode(record, name, images[-1], collector),
        instruction="",
        action=action,
        sequence=collector.sequence(images),
        position=len(images) - 1,
        texts=texts,
        conversation=question,
    )


def _turns(raw: object) -> tuple[str, str]:
    """The question and the answer of a conversation that has just these."""
    if not isinstance(raw, list) or len(raw) != 2 or not all(isinstance(turn, dict) for turn in raw):
        raise BadUnitError("conversations must be one turn of human and one of gpt")
    for turn, wanted in zip(raw, ("human", "gpt"), strict=True):
        speaker = turn.get("from", turn.get("role"))
        if not isinstance(speaker, str) or SPEAKERS.get(speaker) != wanted:
            raise BadUnitError(f"conversations: a turn is from {str(speaker)[:40]!r}, expected {wanted}")
    texts = [turn.get("value", turn.get("content")) for turn in raw]
    if not all(isinstance(text, str) and text.strip() for text in texts):
        raise BadUnitError("conversations: value is missing or empty")
    if reason := judge_text(*texts):
        raise BadUnitError(f"conversations {reason}")
    return texts[0], texts[1]


def _parse_answer(source: Source, answer: str) -> tuple[tuple[str, str, str], int]:
    """The three texts (empty where the answer is the action alone) and the action."""
    match = FOUR_PARTS.fullmatch(answer)
    texts = ("", "", "") if match is None else (match[1].strip(), match[2].strip(), match[3].strip())
    if match is not None and not all(texts[1:]):
        raise BadUnitError("the answer leaves a description empty")
    return texts, source.parse_action(answer if match is None else match[4])
