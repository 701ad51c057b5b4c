"""The catalogue of presets: what each trains, its size, time and outcome.

`rebased presets` prints it, `rebased presets --markdown` writes
docs/presets.md, and the command finds the names of presets here. It is a list
of plain text, so that they are answered before jax is imported.
"""

from collections.abc import Sequence
import dataclasses
import difflib
import re
import textwrap

_NOT_MEASURED = "not measured"


@dataclasses.dataclass(frozen=True)
class Preset:
  """One preset.

  Attributes:
    name: as it is typed.
    parameters: how many its model has, before any option.
    cpu: time of the whole preset on 2 CPU cores.
    gpu: time of the whole preset on one GPU.
    ended: the held-out accuracy with which one run of it ended.
  """

  name: str
  parameters: int
  cpu: str = _NOT_MEASURED
  gpu: str = _NOT_MEASURED
  ended: str = "not recorded"


@dataclasses.dataclass(frozen=True)
class Group:
  """Presets that train the same task.

  Attributes:
    title: the task.
    what: what the presets train.
    needs: data and hardware.
    expect: what a finished run shows.
    presets: the presets.
  """

  title: str
  what: str
  needs: str
  expect: str
  presets: tuple[Preset, ...]


# Parameters at 128 tokens. Each further position adds 64 numbers.
_PAPER_128 = {
  "attention": 566_400,
  "conv-attention": 554_176,
  "rwkv": 566_528,
  "conv-rwkv": 554_240,
  "mamba": 598_016,
  "based": 569_792,
  "rebased": 570_560,
}
# Parameters at 256 tokens. Each further position adds 48 numbers.
_ABLATION_256 = {
  "based": 431_568,
  "x2": 431_568,
  "norm": 431_568,
  "gamma": 431_952,
  "gamma-beta": 432_336,
  "rebased": 432_336,
}


def _paper() -> tuple[Preset, ...]:
  return tuple(
    Preset(f"mqar-paper-{system}-{length}", count + 64 * (length - 128))
    for system, count in _PAPER_128.items()
    for length in (128, 256, 512, 1024, 2048)
  )


def _ablation() -> tuple[Preset, ...]:
  return tuple(
    Preset(
      f"mqar-paper-ablation-{variant}-{length}", count + 48 * (length - 256)
    )
    for variant, count in _ABLATION_256.items()
    for length in (256, 2048)
  )


CATALOGUE = (
  Group(
    "MQAR, small",
    "Recall of key-value pairs in rows of 32 tokens, 2000 steps of 256 rows: "
    "one preset a system of the paper. `mqar` is ReBased.",
    "a CPU; the data is made as it trains. `mqar-mamba` takes 0.7 s a step "
    "there, over ten times as long as most",
    "A run stops above 99 %, its goal, and its last line says whether it got "
    "there. The runs below were on 2 CPU cores with jax 0.10.2. On another "
    "machine numbers round otherwise: `mqar` once needed 1300 steps, and "
    "`mqar-based` once ended at 93 %.",
    (
      Preset("mqar", 40_128, cpu="1 min", ended="99.6 %, step 650"),
      Preset("mqar-attention", 52_352, cpu="1 min", ended="99.2 %, step 1050"),
      Preset(
        "mqar-conv-attention", 40_128, cpu="1 min", ended="99.4 %, step 750"
      ),
      Preset("mqar-rwkv", 52_480, cpu="4 min"),
      Preset("mqar-conv-rwkv", 40_192, cpu="3 min", ended="27 %, step 2000"),
      Preset("mqar-mamba", 83_968, cpu="25 min"),
      Preset("mqar-based", 39_872, cpu="1 min", ended="99.2 %, step 1100"),
      Preset("mqar-double-based", 51_840, cpu="≤ 4 min"),
      Preset("mqar-double-rebased", 52_352, cpu="≤ 3 min"),
      Preset("mqar-hyena", 79_680, cpu="≤ 4 min"),
      Preset("mqar-conv-hyena", 53_792, cpu="≤ 3 min"),
      Preset("mqar-rebased", 40_128, cpu="1 min", ended="99.6 %, step 650"),
      Preset(
        "mqar-conv-rebased", 40_128, cpu="1 min", ended="99.6 %, step 650"
      ),
      Preset("mqar-conv-based", 39_872, cpu="1 min", ended="99.2 %, step 1100"),
    ),
  ),
  Group(
    "MQAR of the paper",
    "The paper's Figures 1 and 7 at width 64: 64 epochs of 100,000 rows, in "
    "float32.",
    "a GPU; the data is made at the start. On 2 CPU cores "
    "`mqar-paper-rebased-128`, one of the smallest, takes 0.95 s a step, 3.3 "
    "hours for all 12,544",
    "The paper's accuracy and ours, system by system, are in "
    "[](results.md). A run stops above 99 %.",
    _paper(),
  ),
  Group(
    "MQAR, the kernel changed",
    "The ablation of the paper's Table 1 at width 48, with 32 pairs a row.",
    "a GPU; the data is made at the start",
    "The paper's accuracy and ours are in [](results.md). A run stops above "
    "99 %.",
    _ablation(),
  ),
  Group(
    "Small language models",
    "4 layers of width 128 on your text, 1000 steps of 16 rows of 256 tokens: "
    "one preset a system of the paper. `lm-tiny` is ReBased. Mamba has 6 "
    "layers without MLPs.",
    "a CPU; `--data.path`, a data set of `rebased prepare`",
    "A perplexity that depends on the text: none is recorded.",
    (
      Preset("lm-tiny", 694_912, cpu="7 min"),
      Preset("lm-tiny-attention", 859_008, cpu="9 min"),
      Preset("lm-tiny-conv-attention", 760_960, cpu="7 min"),
      Preset("lm-tiny-rwkv", 826_752),
      Preset("lm-tiny-conv-rwkv", 728_448),
      Preset("lm-tiny-mamba", 732_800),
      Preset("lm-tiny-based", 694_400),
      Preset("lm-tiny-double-based", 758_656),
      Preset("lm-tiny-double-rebased", 759_680),
      Preset("lm-tiny-hyena", 936_064),
      Preset("lm-tiny-conv-hyena", 799_488),
      Preset("lm-tiny-rebased", 694_912, cpu="7 min"),
      Preset("lm-tiny-conv-rebased", 694_912, cpu="7 min"),
      Preset("lm-tiny-conv-based", 694_400),
    ),
  ),
  Group(
    "Language models of the paper",
    "The models of the paper's Table 9 and its text, and the same without "
    "positions on rows of 131,072 tokens: 20,000 steps of 4.2 M tokens.",
    "one accelerator of 80 GB or more; `--data.path`, a data set such as the "
    "Pile",
    "No whole run is recorded.",
    (
      Preset("pile-127m-attention", 126_807_552, gpu="2.2 days"),
      Preset("pile-157m-based", 156_955_392),
      Preset("pile-145m-based", 145_453_824),
      Preset("pile-157m-based-long", 153_809_664),
      Preset("pile-145m-based-long", 142_308_096),
      Preset("pile-157m-rebased", 156_992_256, gpu="2.5 days"),
      Preset("pile-145m-rebased", 145_460_736, gpu="2.1 days"),
      Preset("pile-157m-rebased-long", 153_846_528),
      Preset("pile-145m-rebased-long", 142_315_008, gpu="1.9 days"),
    ),
  ),
  Group(
    "Larger language models",
    "Models beyond the paper, which recompute layers in the backward pass.",
    "one accelerator of 80 GB or more, better several; `--data.path`",
    "No whole run is recorded.",
    (
      Preset("pile-360m-attention", 357_943_296),
      Preset("pile-360m-based", 364_318_720),
      Preset("pile-360m-rebased", 364_376_064),
      Preset("pile-1.3b-attention", 1_319_866_368),
      Preset("pile-1.3b-based", 1_345_200_128),
      Preset("pile-1.3b-rebased", 1_345_314_816),
    ),
  ),
)

#: Every preset by name, in the order of the catalogue.
PRESETS = {x.name: x for group in CATALOGUE for x in group.presets}


def check_name(name: str) -> None:
  """Check that there is a preset of this name.

  Raises:
    ValueError: there is none; the message has the nearest names.
  """
  if name not in PRESETS:
    near = " or ".join(_nearest(name))
    hint = f"; did you mean {near}?" if near else "."
    raise ValueError(
      f"there is no preset {name!r}{hint} `rebased presets` lists all"
    )


def _nearest(name: str) -> list[str]:
  """Return the names most like an unknown one, at most three.

  A wrong number at the end, as in mqar-paper-rebased-300, has the nearest
  numbers.
  """
  stem, dash, number = name.rpartition("-")
  if dash and number.isdigit():
    sizes = [
      int(x.removeprefix(f"{stem}-"))
      for x in PRESETS
      if re.fullmatch(rf"{re.escape(stem)}-\d+", x)
    ]
    if sizes:
      closest = sorted(sizes, key=lambda x: abs(x - int(number)))[:2]
      return [f"{stem}-{x}" for x in sorted(closest)]
  return difflib.get_close_matches(name.lower(), PRESETS, n=3)


def as_text() -> str:
  """Return the catalogue for a terminal of 80 columns."""
  parts = []
  for group in CATALOGUE:
    for label in ("what", "needs", "expect"):
      text = f"{label}: {getattr(group, label)}".replace("`", "")
      text = text.replace("[](results.md)", "docs/results.md")
      first = [group.title.upper()] if label == "what" else []
      parts += [
        *first,
        *textwrap.wrap(text, 78, initial_indent="  ", subsequent_indent="    "),
      ]
    width = max(len(x.name) for x in group.presets)
    for row in (_header(group), *_rows(group)):
      cells = f"{row[2]:<12} {row[3]:<12} {' '.join(row[4:])}"
      parts.append(f"  {row[0]:<{width}}{row[1]:>14}  {cells}".rstrip())
    parts.append("")
  return "\n".join(parts)


def as_markdown() -> str:
  """Return docs/presets.md."""
  parts = [
    "# Presets",
    "",
    "`rebased presets` prints this list. `rebased train PRESET` trains one.",
    "Times are estimates of the whole preset. On 2 CPU cores they come from",
    "the fastest of a few steps with jax 0.10.2, while other work shared the",
    "cores. On a GPU they come from the tokens per second of a step on an",
    "H200, see [](performance.md).",
  ]
  for group in CATALOGUE:
    parts += [
      "",
      f"## {group.title}",
      "",
      group.what,
      "",
      f"- Needs: {group.needs}.",
      f"- Expect: {group.expect}",
      "",
      f"| {' | '.join(_header(group))} |",
      "|" + "---|" * len(_header(group)),
    ]
    parts += [f"| `{row[0]}` | {' | '.join(row[1:])} |" for row in _rows(group)]
  return "\n".join(parts) + "\n"


def _header(group: Group) -> Sequence[str]:
  """Return the names of a group's columns."""
  ended = ("one run ended at",) if _has_runs(group) else ()
  return ("preset", "parameters", "2 CPU cores", "one GPU", *ended)


def _rows(group: Group) -> list[Sequence[str]]:
  """Return the rows of a group's table."""
  some = _has_runs(group)
  return [
    (
      preset.name,
      f"{preset.parameters:,}",
      preset.cpu,
      preset.gpu,
      *((preset.ended,) if some else ()),
    )
    for preset in group.presets
  ]


def _has_runs(group: Group) -> bool:
  return any(x.ended != Preset.ended for x in group.presets)
