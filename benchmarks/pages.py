"""Write the tables of the pages from the records in `benchmarks/results`.

    python benchmarks/pages.py

A table stands in a page between `<!-- table: NAME -->` and `<!-- end -->`. The
command replaces what is between them. No figure in such a table is typed.
"""

from collections.abc import Callable
import json
from pathlib import Path
import re
import sys
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import environment  # noqa: E402
from benchmarks.scaling import run as scaling  # noqa: E402

PAGES = (
  *("docs/performance.md", "docs/scaling.md", "docs/kernels.md", "docs/tpu.md"),
  "docs/generation.md",
  *("benchmarks/kernels/README.md", "benchmarks/train_step/README.md"),
)
PEERS = {
  "cudnn": "cuDNN softmax",
  "fla parallel": "FLA, quadratic",
  "quadratic": "XLA, quadratic",
  "xla": "`xla`",
}
_H200 = "kernels_h200.json"
_H100 = "kernels.json"
_MODES = {"forward": "forward", "both": "both passes"}
_MIXERS_RUN_AS = {
  "mosaic_gpu": "our kernel",
  "cudnn": "cuDNN",
  "xla": "XLA program",
}
_TABLE = re.compile(r"<!-- table: ([\w-]+) -->\n.*?<!-- end -->", re.DOTALL)


def read(record: str) -> dict[str, Any]:
  """Return a record of `benchmarks/results`."""
  return json.loads((environment.RESULTS / record).read_text())


def markdown(header: list[str], rows: list[list[str]]) -> str:
  """Return a Markdown table, a line per row."""
  lines = [header, ["---"] * len(header), *rows]
  return "".join("| " + " | ".join(cells) + " |\n" for cells in lines)


def number(ms: float | None) -> str:
  """Return three digits, or a dash if nothing was measured."""
  if ms is None:
    return "–"
  return f"{ms:,.0f}" if ms >= 1000 else f"{ms:.3g}"


def time_of(row: dict[str, Any], peer: str, mode: str) -> float | None:
  """Return milliseconds for all rows of a case, None if they are unknown.

  The quadratic XLA form may have run on some rows of the batch only. Its time
  is then scaled up to all rows.
  """
  times = row.get(peer, {})
  if f"{mode}_ms" not in times:
    return None
  return times[f"{mode}_ms"] * _scale(times)


def _scale(times: dict[str, Any]) -> float:
  """Return all rows over the rows that ran; a note says "5 of 16 rows"."""
  rows = re.fullmatch(r"(\d+) of (\d+) rows", times.get("note", ""))
  return int(rows[2]) / int(rows[1]) if rows else 1.0


def _pair(row: dict[str, Any], peer: str) -> str:
  times = [time_of(row, peer, mode) for mode in _MODES]
  if times[0] is None:
    return "–"
  mark = "~" if _scale(row[peer]) > 1 else ""
  return " / ".join(mark + number(ms) for ms in times)


def operator(record: str) -> str:
  """Return the time of every case and peer, forward / both passes."""
  peers = ("gpu", "xla", "quadratic", "fla parallel", "cudnn", "copy")
  header = ["case", "B, T, H, F, P"]
  header += [PEERS.get(peer, peer) for peer in peers]
  header[2] = "`gpu`"
  rows = []
  for row in read(record)["rows"]:
    sizes = ", ".join(str(row[letter]) for letter in "BTHFP")
    rows.append([row["name"], sizes, *(_pair(row, peer) for peer in peers)])
  return markdown(header, rows)


def losses(record: str) -> str:
  """Return every time that is shorter than that of the Hopper kernels."""
  rows = []
  for row in read(record)["rows"]:
    for mode, title in _MODES.items():
      ours = row["gpu"][f"{mode}_ms"]
      for peer, name in PEERS.items():
        ms = time_of(row, peer, mode)
        if ms is not None and ms < ours:
          case = (
            f"{row['name']}, F = {row['F']}, P = {row['P']}, T = {row['T']}"
          )
          times = [number(ours), number(ms), f"{ours / ms:.2f}"]
          rows.append([case, title, name, *times])
  header = ["case", "time of", "faster peer", "`gpu`, ms", "peer, ms", "ratio"]
  return markdown(header, rows)


def errors(record: str) -> str:
  """Return the largest errors over all cases, for both sets of cotangents."""
  names = ("o", "dq", "dk", "dv")
  cases = [row["gpu"] for row in read(record)["rows"]]
  sets = {
    "errors": "0 on the first 64 tokens, or on the first half of a short row",
    "errors_with_first_tokens": "on all tokens",
  }
  rows = [
    [title, *(f"{max(case[key][x] for case in cases):.1e}" for x in names)]
    for key, title in sets.items()
  ]
  return markdown(["cotangent of o", *names], rows)


def aims() -> str:
  """Return the aims for an H100, beside an H100's record and an H200's."""
  records = [
    {row["name"]: row for row in read(record)["rows"]}
    for record in (_H100, _H200)
  ]
  ours = lambda case, mode: lambda x: time_of(x[case], "gpu", mode)

  def over(case: str, mode: str, peer: str) -> Callable[[Any], float | None]:
    def ratio(x: Any) -> float | None:
      ms = time_of(x[case], peer, mode)
      return None if ms is None else ms / x[case]["gpu"][f"{mode}_ms"]

    return ratio

  wanted: list[tuple[str, str, float, Callable[[Any], float | None]]] = []
  for mode, limits in (
    ("forward", {"lm-1k": 0.125, "lm-32k": 0.19, "lm-64k": 0.20}),
    ("both", {"lm-1k": 0.60, "lm-32k": 0.75, "lm-64k": 0.80}),
  ):
    for case, limit in limits.items():
      title = f"`{case}`, {_MODES[mode]}, ms"
      wanted.append((title, "≤", limit, ours(case, mode)))
  for peer, case, mode, limit in (
    ("cudnn", "lm-1k", "forward", 2.9),
    ("cudnn", "lm-1k", "both", 2.8),
    ("cudnn", "lm-32k", "forward", 37),
    ("cudnn", "lm-32k", "both", 34),
    ("fla parallel", "lm-1k", "forward", 8),
    ("fla parallel", "lm-1k", "both", 6),
    ("fla parallel", "lm-32k", "forward", 33),
    ("fla parallel", "lm-32k", "both", 42),
    ("xla", "pile-157m", "both", 3),
    ("xla", "mqar-64", "both", 3),
  ):
    title = f"`{case}`, {_MODES[mode]}: {PEERS[peer]} over `gpu`"
    wanted.append((title, "≥", limit, over(case, mode, peer)))
  rows = []
  for title, sign, limit, value in wanted:
    h100, h200 = (value(record) for record in records)
    if h100 is None:
      verdict = "not measured"
    else:
      met = h100 <= limit if sign == "≤" else h100 >= limit
      verdict = f"{number(h100)}, {'met' if met else 'missed'}"
    rows.append([title, f"{sign} {limit:g}", verdict, number(h200)])
  header = ["aim, set for an H100", "aim", "H100 record", "H200 record"]
  return markdown(header, rows)


def kernel_peaks() -> str:
  """Return the three kernels' times at T = 1024 and shares of the peaks."""
  (row,) = (x for x in read(_H200)["rows"] if x["name"] == "lm-1k")
  rows = []
  for kernel in ("forward", "backward_queries", "backward_keys"):
    each = row["gpu"]["both_kernels"]["each"]
    x = each[f"polynomial_{kernel}_mosaic_gpu_kernel"]
    shares = [f"{100 * x[key]:.0f} %" for key in ("of_dram", "of_tensor")]
    rows.append([kernel, f"{x['ms']:.3f}", f"{x['floor_ms']:.3f}", *shares])
  header = ["kernel", "ms", "floor, ms", "of the memory's peak"]
  return markdown([*header, "of the tensor core's peak"], rows)


def recurrences() -> str:
  """Return times of Mamba's and RWKV's operators by their kernels, and floors.

  A floor is the largest of three times: bytes at the memory's peak, operations
  at that of float32, and exponentials at an eighth of the latter.
  """
  memory, float32 = 4.8e12, 33.5e12  # a second, by an H200's data sheet
  # Bytes, exponentials and operations of a token and channel, as in the page.
  # (channels, those of a program, forward, backward, each that sums slices)
  counts = {
    "Mamba": (2048, 64, (14, 16, 96), (24, 32, 384), (8, 16, 64), (8, 16, 64)),
    "RWKV": (1024, 128, (7.5, 4, 20), (11.5, 8, 50), (4, 2, 8), (7.5, 6, 30)),
  }
  rows = []
  for row in read("recurrences_h200.json")["times"]:
    if (row["part"], row["by"]) != ("operator", "gpu"):
      continue
    channels, width, *kernels = counts[row["system"]]
    forward, backward, *slices = (
      max(b / memory, 8 * e / float32, o / float32) * 65536 * channels * 1e3
      for b, e, o in kernels
    )
    if 65536 // row["T"] * channels // width < 200:  # time is cut into slices
      forward, backward = forward + slices[0], backward + slices[1]
    cells = [row["system"], f"{row['T']}"]
    for ms, floor in (
      (row["forward"], forward),
      (row["both"], forward + backward),
    ):
      cells += [number(ms), number(floor), f"{100 * floor / ms:.0f} %"]
    rows.append(cells)
  header = ["operator", "T", "forward, ms", "floor, ms", "reached"]
  header += ["with backward, ms", "floor, ms", "reached"]
  return markdown(header, rows)


def mixers() -> str:
  """Return times of one layer, and by which program it ran."""
  rows = read("mixers_gpu.json")["rows"]
  lengths = (512, 2048, 8192, 32768)
  table = []
  for system in dict.fromkeys(row["system"] for row in rows):
    own = {row["T"]: row for row in rows if row["system"] == system}
    cells = [
      f"{number(own[T]['forward']['ms'])} / {number(own[T]['both']['ms'])}"
      for T in lengths
    ]
    (kernel,) = {row["kernel"] for row in own.values()}
    table.append([system, _MIXERS_RUN_AS[kernel], *cells])
  return markdown(["layer", "ran as", *(f"T = {T}" for T in lengths)], table)


def steps(record: str) -> str:
  """Return tokens per second of a training step."""
  data = read(record)
  table = []
  for row in [*data["rows"], *data["peers"]]:
    by = "PyTorch" if "peer" in row else "here"
    size = f"{row['parameters'] / 1e6:.0f} M"
    batch = f"{row['rows']} × {row['length']}"
    rate = [f"{row['tokens_per_second']:,}", f"{100 * row['mfu']:.1f} %"]
    table.append([row["case"], size, by, batch, *rate])
  header = ["model", "parameters", "step by", "rows × tokens", "tokens/s"]
  return markdown([*header, "MFU (6 N)"], table)


def step_details(record: str) -> str:
  """Return memory, idle time and gradient error of a training step."""
  rows = [
    [
      row["case"],
      f"{row['rows']} × {row['length']}",
      f"{row['program_bytes'] / 2**30:.1f}",
      f"{100 * row['idle']:.1f} %",
      f"{row['gradient_error']:.3f}",
    ]
    for row in read(record)["rows"]
  ]
  header = ["model", "rows × tokens", "GiB", "idle", "gradient error"]
  return markdown(header, rows)


def cpu() -> str:
  """Return times of the operator on a CPU."""
  rows = read("attention_cpu.json")["rows"]
  of = {(row["form"], row["mode"], row["T"]): row["seconds"] for row in rows}
  table = []
  for T in sorted({row["T"] for row in rows}):
    cells = []
    for form in ("linear", "quadratic"):
      modes = ("forward", "forward+backward")
      times = [of.get((form, mode, T)) for mode in modes]
      ms = [None if time is None else 1000 * time for time in times]
      cells.append(" / ".join(map(number, ms)))
    table.append([str(T), *cells])
  return markdown(["T", "`xla`, linear", "quadratic"], table)


def text() -> str:
  """Return held-out perplexities after the same tokens of text."""
  rows = []
  for name, system in read("text_run.json")["systems"].items():
    end = system["final"]
    keys = ("perplexity", "ar_perplexity", "non_ar_perplexity")
    size = f"{system['parameters'] / 1e6:.0f} M"
    rows.append([name, size, *(f"{end[key]:.3g}" for key in keys)])
  return markdown(["model", "parameters", "all", "AR", "non-AR"], rows)


def training() -> str:
  """Return how far runs of one seed and runs of one implementation differ."""
  rows = []
  for name, case in read("gpu_training.json")["cases"].items():
    ends = case["held_out_loss_and_accuracy"]
    for seed, pair in enumerate(zip(ends["gpu"], ends["xla"], strict=True)):
      cells = [f"{loss:.3f} ({100 * hit:.1f} %)" for loss, hit in pair]
      rows.append([name, str(seed), *cells, f"{pair[0][0] - pair[1][0]:+.3f}"])
  return markdown(["case", "seed", "`gpu`", "`xla`", "difference"], rows)


def paired() -> str:
  """Return how far runs of equal seeds differ from XLA's and float32's."""
  verdict = read("paired_runs.json")["verdict"]
  rows = []
  for name, (bias, error) in verdict["bias_at_start"].items():
    row = verdict["variants"].get(name)
    end = start = broken = "–"
    if row is not None:
      end = f"{row['mean']:+.5f} ± {row['standard_error']:.5f}"
      start = f"{row['start_ratio']:.2f}"
      failed = [key for key, passes in row["passes"].items() if not passes]
      broken = ", ".join(failed) or "nothing"
    at_start = f"{bias:+.6f} ± {error:.6f}"
    rows.append([f"`{name}`", end, at_start, start, broken])
  header = ["variant", "end, minus `xla`", "start, minus `float32`"]
  return markdown([*header, "distance at the start", "breaks"], rows)


def gradients() -> str:
  """Return the gradient's error by variant, and what wrong kernels break."""
  record = read("gradient_error.json")
  verdict = record["verdict"]
  first, last = record["points"]
  rows = []
  for name, broken in [("xla", []), *verdict["broken"].items()]:
    cells = []
    for point in (first, last):
      row = record["points"][point][name]
      cells += [f"{row['error']:.3f}", f"{row['mixers']:.3f}"]
    found = verdict["variants"].get(name, {})
    swaps = [row["swap"] for row in found.values()]
    swap = "–"
    if swaps:
      low = min(x["smallest"] for x in swaps)
      swap = f"{low:.3f} to {max(x['largest'] for x in swaps):.3f}"
    breaks = (", ".join(broken) or "nothing") if swaps else "–"
    rows.append([f"`{name}`", *cells, swap, breaks])
  header = ["variant", f"{first}: whole", "mixers", f"{last}: whole", "mixers"]
  return markdown([*header, "ratio by a swap", "breaks"], rows)


def decoding() -> str:
  """Return milliseconds a token, tokens per second and bytes of the state."""
  found = [x for x in read("decode_gpu.json")["rows"] if "context" in x]
  rows = []
  for context, B in dict.fromkeys((x["context"], x["rows"]) for x in found):
    cells = []
    for row in found:
      if (row["context"], row["rows"]) != (context, B):
        continue
      if "out_of_memory" in row:
        cells += ["does not fit", "–", "–"]
        continue
      cells += [
        number(row["ms_per_token"]),
        f"{row['tokens_per_second']:,.0f}",
        f"{row['state_bytes'] / 1e6:,.1f}",
      ]
    rows.append([f"{context:,}", str(B), *cells])
  header = ["context", "rows", "ReBased, ms a token", "tokens/s", "state, MB"]
  return markdown(
    [*header, "attention, ms a token", "tokens/s", "cache, MB"], rows
  )


def first_tokens() -> str:
  """Return the seconds to the first token after a prompt."""
  found = [x for x in read("decode_gpu.json")["rows"] if "prompt" in x]
  rows = []
  for T in dict.fromkeys(x["prompt"] for x in found):
    times = [x["first_token_seconds"] for x in found if x["prompt"] == T]
    rows.append([f"{T:,}", *(f"{x:.3f}" for x in times)])
  return markdown(["prompt", "ReBased, s", "attention, s"], rows)


def tpu_schedule() -> str:
  """Return bundles per token and head at F = 16, from libtpu's schedule."""
  goals = {"v5e": ("1.7", "6"), "v5p": ("1.7", "6"), "v6e": ("1.3", "5")}
  figures = read("tpu_schedule.json")["figures"]
  rows = []
  for chip, (forward, together) in goals.items():
    found = [
      figures[f"{chip}-F16"][kernel]["bundles_per_token_head"]
      for kernel in ("forward", "backward_queries", "backward_keys")
    ]
    cells = [f"{x:.2f}" for x in (*found, sum(found))]
    rows.append([chip, cells[0], forward, *cells[1:], together])
  header = ["bundles per token and head", "forward", "goal"]
  header += ["backward, queries", "backward, keys", "together", "goal"]
  return markdown(header, rows)


TABLES: dict[str, Callable[[], str]] = {
  "operator-h200": lambda: operator(_H200),
  "operator-h100": lambda: operator(_H100),
  "operator-losses": lambda: losses(_H200),
  "operator-errors": lambda: errors(_H200),
  "operator-cpu": cpu,
  "aims": aims,
  "kernel-peaks": kernel_peaks,
  "mixers": mixers,
  "recurrences": recurrences,
  "step-h200": lambda: steps("train_step_h200.json"),
  "step-h100": lambda: steps("train_step_gpu.json"),
  "step-details": lambda: step_details("train_step_h200.json"),
  "text": text,
  "training": training,
  "paired": paired,
  "gradients": gradients,
  "decoding": decoding,
  "first-tokens": first_tokens,
  "scaling": lambda: scaling.tables(read("scaling.json")),
  "tpu-schedule": tpu_schedule,
}


def names(page: str) -> list[str]:
  """Return the names of the tables in a page's text."""
  return _TABLE.findall(page)


def filled(page: str) -> str:
  """Return a page's text with each table as its record has it.

  Raises:
    ValueError: a table has no end.
    KeyError: a marker names a table that does not exist.
  """
  if len(names(page)) != page.count("<!-- table:"):
    raise ValueError("a `<!-- table: NAME -->` has no `<!-- end -->`; add it")
  return _TABLE.sub(_filled, page)


def _filled(found: re.Match[str]) -> str:
  name = found[1]
  if name not in TABLES:
    known = ", ".join(TABLES)
    raise KeyError(f"no table is called {name!r}; expected one of {known}")
  return f"<!-- table: {name} -->\n\n{TABLES[name]()}\n<!-- end -->"


def main() -> None:
  for name in PAGES:
    path = environment.ROOT / name
    before = path.read_text()
    after = filled(before)
    if after != before:
      path.write_text(after)
    print(f"{name}: {'written' if after != before else 'unchanged'}")


if __name__ == "__main__":
  main()
