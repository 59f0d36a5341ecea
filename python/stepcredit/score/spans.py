"""Spans of a response, as a line of a log holds them: checked, and with neighbours of one kind and step as one."""

from __future__ import annotations

from typing import Any

from stepcredit._names import nearest
from stepcredit.rollout import Span, SpanKind

#: Kinds that a span of a response can have.
KINDS = tuple(kind.value for kind in SpanKind if kind is not SpanKind.PROMPT)
_INTEGERS = ("start", "stop", "step")


def is_integer(value: object) -> bool:
    """As JSON has integers: 3 and 3.0 are, true is not."""
    return (isinstance(value, int) and not isinstance(value, bool)) or (isinstance(value, float) and value.is_integer())


def read_spans(items: list[dict[str, Any]], length: int, where: str) -> list[Span]:
    """The spans of a response of `length` tokens.

    They tile it in order. QUERY and DOCUMENTS carry the number of their search as `step` where they belong to one:
    numbers do not fall, the query stands before its passages, and passages are one run of tokens.

    Raises:
        ValueError: they do not, or an item is no span; names `where` and the item.
    """
    spans: list[Span] = []
    for i, item in enumerate(items):
        span = _span(item, f"{where}: field 'spans[{i}]'")
        at = spans[-1].stop if spans else 0
        if span.start != at or span.stop <= span.start:
            raise ValueError(
                f"{where}: field 'spans[{i}]' is [{span.start}, {span.stop}), but spans tile the response, so that it "
                f"must start at {at} and not be empty"
            )
        if spans and (spans[-1].kind, spans[-1].step) == (span.kind, span.step):
            spans[-1] = Span(span.kind, spans[-1].start, span.stop, span.step)
        else:
            _check_step(span, spans, f"{where}: field 'spans[{i}]'")
            spans.append(span)
    if (end := spans[-1].stop if spans else 0) != length:
        raise ValueError(f"{where}: field 'spans' ends at {end}, but response_ids has {length} entries")
    return spans


def _span(item: dict[str, Any], where: str) -> Span:
    for name in item:
        if name not in ("kind", *_INTEGERS):
            raise ValueError(f"{where} has an unknown field {name!r}{nearest(name, ('kind', *_INTEGERS))}")
    for name in ("kind", "start", "stop"):
        if name not in item:
            raise ValueError(f"{where} has no {name!r}; it has {', '.join(item) or 'none'}")
    if item["kind"] not in KINDS:
        hint = nearest(str(item["kind"]), KINDS)
        raise ValueError(f"{where} has kind {item['kind']!r:.200}, known: {', '.join(KINDS)}{hint}")
    for name in _INTEGERS:
        least = -1 if name == "step" else 0
        if not is_integer(item.get(name, -1)) or item.get(name, least) < least:
            raise ValueError(f"{where} has {name}={item[name]!r:.200}, expected an integer from {least}")
    return Span(SpanKind(item["kind"]), int(item["start"]), int(item["stop"]), int(item.get("step", -1)))


def _check_step(span: Span, before: list[Span], where: str) -> None:
    """That a span which opens a query or passages fits those of the searches before it."""
    if span.step < 0 or span.kind not in (SpanKind.QUERY, SpanKind.DOCUMENTS):
        return
    past = [s for s in before if s.step >= 0 and s.kind in (SpanKind.QUERY, SpanKind.DOCUMENTS)]
    name = f"{where} ({span.kind.value}) is of step {span.step}, but "
    if past and span.step < past[-1].step:
        raise ValueError(f"{name}a span before it is of step {past[-1].step}")
    if any(s.kind is SpanKind.DOCUMENTS and s.step == span.step for s in past):
        raise ValueError(f"{name}the documents of that step came before; a step has one run of documents")
    if span.kind is SpanKind.DOCUMENTS and not any(s.step == span.step for s in past):
        raise ValueError(f"{name}there is no query of that step before it")
