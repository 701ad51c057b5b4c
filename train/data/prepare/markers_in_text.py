"""Keep text from becoming control tokens, such as the end of a document.

A `tokenizer.json` can turn the text `</s>` into the control token `</s>` in two
ways. Both are closed in a copy of the tokenizer that only encodes:

1. An added token is searched for in the text before the model runs. Only the
   special ones can be switched off, so every control token is made special.
2. The model spells the token itself: it is a word or piece of the vocabulary,
   or a merge makes it. There it gets a name that text does not have.

Token numbers stay as they are.
"""

from collections.abc import Collection
import json
import re
from typing import Any

# Added tokens that are control tokens even if the file does not say so.
_CONTROL = re.compile(r"<\S+>|\[\S+\]")
# Byte fallback looks these tokens up by their names.
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_HIDDEN = "\ufdd0{}\ufdd1"  # these two are no characters in Unicode


def without_markers(data: bytes, ends: Collection[str]) -> str | None:
  """Return a tokenizer that leaves control tokens in a text as text.

  Control tokens are the added tokens that are special or are written in angle
  or square brackets, and the tokens that end a document.

  Args:
    data: the content of a `tokenizer.json`.
    ends: the names of the tokens that end a document, in the file or not.

  Returns:
    The content of a `tokenizer.json` for which `encode_special_tokens` has to
    be set. None if the given one is right already.

  Raises:
    KeyError, TypeError, ValueError: the file has another structure.
  """
  content = json.loads(data)
  model, added = content["model"], content.get("added_tokens") or []
  controls = {*ends} | {
    token["content"]
    for token in added
    if token["special"] or _CONTROL.fullmatch(token["content"])
  }
  unmarked = [
    token
    for token in added
    if token["content"] in controls and not token["special"]
  ]
  for token in unmarked:
    token["special"] = True
  spelt = {
    name
    for name in controls & _spelt(model)
    if len(name) > 1 and not _BYTE.fullmatch(name)
  }
  if not unmarked and not spelt:
    return None
  _hide(model, spelt)
  for token in added:
    if token["content"] in spelt:
      token["content"] = _HIDDEN.format(token["content"])
  # It adds tokens around a document, under names that may be hidden now.
  content["post_processor"] = None
  return json.dumps(content)


def _spelt(model: dict[str, Any]) -> set[str]:
  """Return the tokens that a model can make from text by itself."""
  if isinstance(model["vocab"], list):  # Unigram: pairs of piece and score
    return {piece for piece, _ in model["vocab"]}
  if "merges" not in model or model.get("ignore_merges"):
    return set(model["vocab"])
  return {_merged(merge, model) for merge in model["merges"]}


def _hide(model: dict[str, Any], names: set[str]) -> None:
  """Give tokens of a model names that text does not have, in place."""

  def new(name: str) -> str:
    return _HIDDEN.format(name) if name in names else name

  if isinstance(model["vocab"], list):
    model["vocab"] = [[new(piece), score] for piece, score in model["vocab"]]
    return
  model["vocab"] = {new(name): i for name, i in model["vocab"].items()}
  if model.get("unk_token") is not None:
    model["unk_token"] = new(model["unk_token"])
  if "merges" in model:
    model["merges"] = [
      merge
      for merge in model["merges"]
      if not names & {*_pair(merge), _merged(merge, model)}
    ]


def _pair(merge: str | list[str]) -> list[str]:
  """Return the two tokens of a merge, which older files write as one text."""
  return merge.split(" ") if isinstance(merge, str) else merge


def _merged(merge: str | list[str], model: dict[str, Any]) -> str:
  """Return the token that a merge makes."""
  left, right = _pair(merge)
  prefix = model.get("continuing_subword_prefix") or ""
  return left + right.removeprefix(prefix)
