"""The form of a refusal: the key, the value received, what is allowed.

A value may have megabytes: it is cut after 200 characters, and of many mistakes the first ten are named. What
is allowed comes from the model's own fields, so that a new key needs no text of its own.
"""

import difflib
import json
from collections.abc import Sequence
from functools import partial
from itertools import takewhile
from types import NoneType
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError

LONGEST = 200  # characters of a value in a message
MOST = 10  # mistakes of a section that are named
LEFT_OUT = "the key left out"
KINDS = {bool: "true, false", int: "an integer", float: "a number", str: "a text"}

M = TypeVar("M", bound=BaseModel)


def refusal(path: str, received: Any, allowed: str) -> ValueError:
    """The one form of a refusal: key, value, what is allowed."""
    return ValueError(f"{cut(path)}: received {show(received)}, allowed: {allowed}")


def show(value: Any) -> str:
    """A value as it stands in JSON, for a message."""
    return cut(as_json(value))


def as_json(value: Any) -> str:
    """A value as it stands in JSON, whole; of another kind, as Python shows it."""
    for text_of in (partial(json.dumps, default=repr), repr):
        try:
            return str(text_of(value))
        except Exception:  # a circle, a depth or a number beyond Python's, a repr that raises
            continue
    return f"a {type(value).__name__}"


def cut(text: str) -> str:
    """At most LONGEST characters of a text."""
    mark = f"... ({len(text):,} characters)"
    return text if len(text) <= LONGEST else text[: LONGEST - len(mark)] + mark


def where_they_differ(mine: str, other: str) -> tuple[str, str]:
    """Two texts, cut so that the first difference is in what is left."""
    alike = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(mine, other, strict=False)))
    start = alike - LONGEST // 2
    if start <= 0:
        return cut(mine), cut(other)
    name = cut(mine[:start].partition(": ")[0])
    first, second = (f"{name}: ...{text[start : start + LONGEST]}" for text in (mine, other))
    return first, second


def validate(model: type[M], section: Any, path: str) -> M:
    """A section as its model. Raises ValueError with one line per mistake."""
    try:
        return model.model_validate(section)
    except ValidationError as error:
        mistakes = [_explain(model, each, path) for each in error.errors(include_url=False)]
    more = [f"{path}: {len(mistakes) - MOST:,} mistakes more"] if len(mistakes) > MOST else []
    raise ValueError("\n".join(mistakes[:MOST] + more))


def allowed_of(annotation: Any, limits: tuple[Any, ...] = ()) -> str:
    """The values that a field of this type accepts, as text. limits: pydantic's constraints of the field."""
    kind, inner = get_origin(annotation), get_args(annotation)
    if kind is Annotated:
        return allowed_of(inner[0], tuple(inner[1].metadata))
    if NoneType in inner:
        return f"{allowed_of(inner[0], limits)}, {LEFT_OUT}"
    if kind is Literal:
        return ", ".join(map(show, inner))
    if kind is list:
        length = f" of {limits[0].min_length}" if limits else ""
        return f"a list{length}, each {allowed_of(inner[0])}"
    if issubclass(annotation, BaseModel):
        return f"an object of {', '.join(annotation.model_fields)}"
    return ", ".join([KINDS[annotation], *map(_limit, limits)])


def _limit(limit: Any) -> str:
    words = {"ge": "{} or more", "gt": "more than {}", "lt": "less than {}"}
    return next(text.format(getattr(limit, name)) for name, text in words.items() if hasattr(limit, name))


def _explain(model: type[BaseModel], error: Any, section: str) -> str:
    """One of pydantic's errors in our form."""
    names = [str(each) for each in error["loc"]]
    key = ".".join(names)
    path = f"{section}.{key}" if key else section
    annotation: Any = model
    limits: tuple[Any, ...] = ()
    for name in names:
        if get_origin(annotation) is list:
            break  # an element: the type of the list says it
        keys = annotation.model_fields
        if name not in keys:
            return _unknown(path, name, error["input"], [*keys])
        annotation, limits = keys[name].annotation, tuple(keys[name].metadata)
    return str(refusal(path, error["input"], allowed_of(annotation, limits)))


def _unknown(path: str, name: str, value: Any, keys: list[str]) -> str:
    close = difflib.get_close_matches(name[:LONGEST], keys, n=1)
    hint = f' (did you mean "{close[0]}"?)' if close else ""
    received = f"received an unknown key with the value {show(value)}"
    return f"{cut(path)}: {received}, allowed: {', '.join(keys)}{hint}"


NAMED = 3  # parameters that a message names


def naming(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
