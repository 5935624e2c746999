"""Turns ``results/*.json`` into the tables and plots of ``README.md``: ``python benchmarks/report.py``."""

import argparse
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from schema import TINY, load

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

HERE = Path(__file__).parent
BEGIN, END = "<!-- results: written by report.py -->", "<!-- end of results -->"
MINE = "camkernels"
TUNED = "compile-max-autotune"
# For their users to see; nothing is judged against them but what ``SPEED_UP_OVER`` says. What a table calls
# each, and whom it is for.
OTHERS = {
    "released": ("released code", "what users of the code that came with the paper would gain from"),
    "gathered": ("gathered", "what users who gather the rows of the weight themselves would gain from"),
    "exact": ("exact batch", "what users who batch scikit-image's arithmetic in PyTorch would gain from"),
    "skimage": ("scikit-image", "what users of a loop over scikit-image would gain from"),
}

FLOOR_LIMIT = {"cpu": 1.3, "cuda": 1.25}  # times the floor, in memory-bound rows
GEOMETRIC_MEAN = 2.0  # speed-up over the faster of eager and compile
MEMORY_LIMIT = 1.05  # times outputs + gradients + what backward may keep
# On the CPU: how much faster than the faster of eager and compile, where more is asked for than to be
# faster. By op and pass, then by row.
SPEED_UP = {
    ("fused_cam_seeds", "forward"): {"smoke": 2.0},
    ("fused_cam_transform_mse", "forward+backward"): {
        "smoke-flip": 1.3,  # bound by memory, like the next two
        "wider-flip": 1.3,
        "pa100k-flip": 1.3,
        "coco-flip": 1.8,  # six matrix products become three
        "many-labels": 1.8,
        "wider-scale": 2.5,  # the products alone are a quarter of eager's time
        "coco-scale": 2.5,
    },
    ("fused_negative_cam_loss", "forward+backward"): {  # the rows that choose at most a fifth of the classes
        "smoke": 3.0,
        "smoke-multi-label": 3.0,
        "imagenet-r101": 3.0,
    },
    ("otsu_mask", "forward"): {"many-maps": 5.0},
}
# The same over one of ``OTHERS``, by op, pass and provider.
SPEED_UP_OVER = {
    ("otsu_mask", "forward", "exact"): {"many-maps": 5.0},
    ("otsu_mask", "forward", "skimage"): {"many-maps": 20.0},
}
# How many times less than eager an op takes above outputs + gradients: half the number of classifiers.
LESS_MEMORY = {"fused_local_activations": {"smoke-many": 8.0, "cub-448": 8.0, "cars-448": 8.0}}

Row = dict[str, Any]  # as schema.Row


@dataclass(frozen=True)
class Measurement:
    """All providers of one row, variant and direction."""

    op: str
    device: str
    providers: dict[str, Row]

    @property
    def mine(self) -> Row:
        return self.providers[MINE]

    @property
    def name(self) -> str:
        row = self.mine
        return f"{self.op}/{row['id']}/{row['variant']}/{row['direction']}"

    @property
    def rival(self) -> float:
        """Seconds of the fastest other provider."""
        return float(min(row["seconds"] for name, row in self.providers.items() if name != MINE))

    @property
    def speed_up(self) -> float:
        return float(self.rival / self.mine["seconds"])

    @property
    def times_floor(self) -> float:
        return float(self.mine["seconds"] / self.mine["floor_seconds"])


@dataclass(frozen=True)
class Verdict:
    target: str
    subject: str  # name of a measurement, or of the op for a mean over all
    met: bool
    measured: str


def _grouped(op: str, device: str, rows: Iterable[Row]) -> list[Measurement]:
    grouped: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        key = tuple(row[part] for part in ("id", "variant", "direction"))
        grouped.setdefault(key, {})[row["provider"]] = row
    return [Measurement(op, device, providers) for providers in grouped.values()]


def measurements(op: str, device: str, rows: Iterable[Row]) -> list[Measurement]:
    """Camkernels and the providers that it is judged against."""
    found = _grouped(op, device, [row for row in rows if row["provider"] not in OTHERS])
    return [each for each in found if MINE in each.providers and len(each.providers) > 1]


def measurements_beside(other: str, op: str, device: str, rows: Sequence[Row]) -> list[Measurement]:
    """Camkernels and one of ``OTHERS`` alone, where both ran."""
    found = _grouped(op, device, [row for row in rows if row["provider"] in (MINE, other)])
    return [each for each in found if len(each.providers) == 2]


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(math.fsum(map(math.log, values)) / len(values))


def judge(measured: Sequence[Measurement]) -> list[Verdict]:
    """Every target of one op on one device, from its numbers."""
    verdicts = []
    for each in measured:
        verdicts += _judge_one(each)
    if measured:
        mean = geometric_mean([each.speed_up for each in measured])
        verdicts.append(
            Verdict("geometric mean", measured[0].op, mean >= GEOMETRIC_MEAN, f"{mean:.2f} x faster")
        )
    return verdicts


def _judge_one(each: Measurement) -> list[Verdict]:
    mine, name, on_gpu = each.mine, each.name, each.device != "cpu"
    verdicts = []
    if mine["floor_bound"] == "bytes" and not (on_gpu and mine["id"].startswith("smoke")):
        limit = FLOOR_LIMIT["cuda" if on_gpu else "cpu"]
        measured = f"{each.times_floor:.2f} x floor"
        verdicts.append(Verdict("near the floor", name, each.times_floor <= limit, measured))
    if on_gpu and TUNED in each.providers:
        gain = each.providers[TUNED]["seconds"] / mine["seconds"]
        verdicts.append(Verdict("faster", name, gain >= 1, f"{gain:.2f} x faster than {TUNED}"))
    else:
        verdicts.append(Verdict("faster", name, each.speed_up > 1, f"{each.speed_up:.2f} x faster"))
    wanted = SPEED_UP.get((each.op, mine["direction"]), {}).get(mine["id"])
    if wanted is not None and not on_gpu:
        measured = f"{each.speed_up:.2f} x faster, {wanted} x wanted"
        verdicts.append(Verdict("speed-up", name, each.speed_up >= wanted, measured))
    if on_gpu and "eager" in each.providers:
        ours, eager = mine["host_seconds"], each.providers["eager"]["host_seconds"]
        measured = f"{ours * 1e6:.0f} µs, eager {eager * 1e6:.0f} µs"
        verdicts.append(Verdict("host time", name, ours < eager, measured))
    if mine["peak_extra_bytes"] is not None:
        share = mine["peak_extra_bytes"] / (mine["result_bytes"] + mine["kept_bytes"])
        what = "outputs + gradients" + (" + kept" if mine["kept_bytes"] else "")
        verdicts.append(Verdict("memory", name, share <= MEMORY_LIMIT, f"{share:.3f} x {what}"))
    wanted = LESS_MEMORY.get(each.op, {}).get(mine["id"])
    if wanted is not None and mine["peak_extra_bytes"] is not None and "eager" in each.providers:
        peaks = [row["peak_extra_bytes"] for row in (each.providers["eager"], mine)]
        eager, ours = (max(peak - mine["result_bytes"], 1) for peak in peaks)
        measured = f"{eager / ours:.1f} x less, {wanted:g} x wanted; {peaks[0] / peaks[1]:.1f} x with results"
        verdicts.append(Verdict("less memory", name, eager / ours >= wanted, measured))
    return verdicts


def judge_beside(other: str, measured: Sequence[Measurement]) -> list[Verdict]:
    """Where more is asked for than one of ``OTHERS`` does."""
    verdicts = []
    for each in measured:
        wanted = SPEED_UP_OVER.get((each.op, each.mine["direction"], other), {}).get(each.mine["id"])
        if wanted is not None and each.device == "cpu":
            text = f"{each.speed_up:.2f} x faster than {OTHERS[other][0]}, {wanted} x wanted"
            verdicts.append(Verdict("speed-up", each.name, each.speed_up >= wanted, text))
    return verdicts


def cause(notes: dict[str, dict[str, str]], device: str, verdict: Verdict) -> str:
    """The note with the longest key that begins the verdict's ``target: subject`` or its subject."""
    known = notes.get(device, {})
    for text in (f"{verdict.target}: {verdict.subject}", verdict.subject):
        keys = [key for key in known if text.startswith(key)]
        if keys:
            return known[max(keys, key=len)]
    return "no cause noted"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines] + [""]


def mebibytes(count: int | None) -> str:
    return "-" if count is None else f"{count / 2**20:.2f}"


def targets_table() -> list[str]:
    rows = [
        (
            "near the floor",
            f"≤ {FLOOR_LIMIT['cpu']} x floor, of rows that bytes bind",
            f"≤ {FLOOR_LIMIT['cuda']} x floor at the large sizes",
        ),
        (
            "faster",
            "every row faster than the faster of eager and compile",
            f"every row at least as fast as {TUNED}",
        ),
        ("speed-up", "over the faster of eager and compile, of the rows below", "-"),
        ("geometric mean", f"≥ {GEOMETRIC_MEAN:g} x", f"≥ {GEOMETRIC_MEAN:g} x"),
        ("host time", "-", "per call below eager's"),
        ("memory", *[f"peak extra bytes ≤ outputs + gradients (+ kept) + {MEMORY_LIMIT - 1:.0%}"] * 2),
        (
            "less memory",
            *["peak extra bytes above outputs + gradients: eager's over ours, of the rows below"] * 2,
        ),
    ]
    lines = table(("target", "CPU, 2 cores", "H200"), rows)
    for (op, direction), wanted in SPEED_UP.items():
        each = ", ".join(f"{row} {gain} x" for row, gain in wanted.items())
        lines += [f"Speed-up wanted of `{op}`, {direction}: {each}.", ""]
    for (op, direction, other), wanted in SPEED_UP_OVER.items():
        each = ", ".join(f"{row} {gain} x" for row, gain in wanted.items())
        lines += [f"Over {OTHERS[other][0]} wanted of `{op}`, {direction}: {each}.", ""]
    for op, wanted in LESS_MEMORY.items():
        each = ", ".join(f"{row} {gain} x" for row, gain in wanted.items())
        lines += [f"Less memory than eager wanted of `{op}`: {each}.", ""]
    return lines


def summary(files: dict[str, dict[str, Any]], notes: dict[str, dict[str, str]]) -> list[str]:
    met_rows, missed_rows = [], []
    names = ("near the floor", "faster", "speed-up", "geometric mean", "host time", "memory", "less memory")
    for slug, content in files.items():
        for op, run in content["runs"].items():
            measured = measurements(op, content["device"], run["rows"])
            verdicts = judge(measured)
            for other in OTHERS:
                beside = measurements_beside(other, op, content["device"], run["rows"])
                verdicts += judge_beside(other, beside)
            tally = []
            for target in names:
                about = [verdict for verdict in verdicts if verdict.target == target]
                met = sum(verdict.met for verdict in about)
                word = "-" if not about else "met" if met == len(about) else "**missed**"
                if target == "geometric mean" and about:
                    tally.append(f"{word}: {about[0].measured}")
                else:
                    tally.append(f"{word}: {met} of {len(about)}" if about else word)
            met_rows.append((content["name"], f"`{op}`", *tally))
            missed_rows += [
                (content["name"], f"`{v.subject}`", v.target, v.measured, cause(notes, slug, v))
                for v in verdicts
                if not v.met
            ]
    lines = table(("device", "op", *names), met_rows)
    if missed_rows:
        lines += ["What misses a target:", ""]
        lines += table(("device", "row", "target", "measured", "cause"), missed_rows)
    return lines


def device_section(slug: str, content: dict[str, Any], plots: dict[str, str]) -> list[str]:
    lines = [f"### {content['name']}", ""]
    for op, run in content["runs"].items():
        machine = run["machine"]
        measured = measurements(op, content["device"], run["rows"])
        facts = [f"torch {machine['torch']}", f"Triton {machine['triton']}", f"Python {machine['python']}"]
        facts += [
            f"{machine['threads']} CPU threads",
            f"last-level cache {machine['last_level_cache_bytes'] >> 20} MiB",
        ]
        facts += [f"camkernels {machine['camkernels']} at commit {machine['commit']}", machine["date"]]
        copies = [each.mine["copy_bytes_per_second"] / 1e9 for each in measured]
        if copies:
            facts.append(f"copy {min(copies):.1f} to {max(copies):.1f} GB/s")
        facts.append(f"matrix product {machine['matrix_flops_per_second'] / 1e12:.2f} TFLOP/s")
        if machine.get("freed_memory_kept"):
            facts.append("freed memory kept in the process")
        lines += [f"`{op}`: {', '.join(facts)}.", ""]
        if op in plots:
            lines += [f"![{op} on {content['name']}: time of each provider over the floor]({plots[op]})", ""]
        lines += full_table(measured)
        for other in OTHERS:
            beside = measurements_beside(other, op, content["device"], run["rows"])
            lines += table_beside(other, op, beside)
    return lines


def tiny_section(content: dict[str, Any]) -> list[str]:
    """What a call costs where its tensors take no time."""
    rows = []
    for op, run in content["runs"].items():
        if not op.endswith(TINY):
            continue
        for each in measurements(op.removesuffix(TINY), content["device"], run["rows"]):
            host = {name: row["host_seconds"] * 1e6 for name, row in each.providers.items()}
            if "eager" in host:
                share, mine = host[MINE] / host["eager"], each.mine
                rows.append(
                    (
                        f"`{each.op}`",
                        mine["variant"],
                        mine["direction"],
                        f"{host['eager']:.0f}",
                        f"{host[MINE]:.0f}",
                        f"{share:.2f}" if share <= 1 else f"**{share:.2f}**",
                    )
                )
    if not rows:
        return []
    header = ("op", "variant", "pass", "eager host µs", f"{MINE} host µs", "of eager's")
    return [f"### {content['name']}, tiny tensors", "", *table(header, rows)]


def table_beside(other: str, op: str, measured: Sequence[Measurement]) -> list[str]:
    if not measured:
        return []
    label, users = OTHERS[other]
    header = (
        "row", "variant", "pass", f"{label} ms", f"{MINE} ms", "times faster",
        f"{label} peak extra MiB", f"{MINE} peak extra MiB",
    )  # fmt: skip
    rows = []
    for each in measured:
        mine, theirs = each.mine, each.providers[other]
        rows.append(
            (
                mine["id"],
                mine["variant"],
                mine["direction"],
                f"{theirs['seconds'] * 1e3:.3f}",
                f"{mine['seconds'] * 1e3:.3f}",
                f"{each.speed_up:.1f}",
                *(mebibytes(row["peak_extra_bytes"]) for row in (theirs, mine)),
            )
        )
    judged = any(key[0] == op and key[2] == other for key in SPEED_UP_OVER)
    caption = f"Not judged{' but for the speed-up wanted above' if judged else ''}: {users} `{op}`."
    return [caption, "", *table(header, rows)]


def full_table(measured: Sequence[Measurement]) -> list[str]:
    header = (
        "row", "N", "variant", "pass", "provider", "ms", "quartiles", "floor ms", "x floor", "speed-up",
        "peak extra MiB", "outputs + gradients (+ kept) MiB", "launches", "host µs",
    )  # fmt: skip
    rows = []
    for each in measured:
        for name, row in each.providers.items():
            images = str(row["shape"]["N"])
            if row["shape"]["N"] != row["full_images"]:
                images += f" (of {row['full_images']})"
            allowed = mebibytes(row["result_bytes"])
            if row["kept_bytes"]:
                allowed += f" + {mebibytes(row['kept_bytes'])}"
            label = f"{name} ({row['backend']})" if name == MINE else name
            rows.append(
                (
                    row["id"],
                    images,
                    row["variant"],
                    row["direction"],
                    label,
                    f"{row['seconds'] * 1e3:.3f}",
                    f"{row['seconds_low'] * 1e3:.3f} - {row['seconds_high'] * 1e3:.3f}",
                    f"{row['floor_seconds'] * 1e3:.3f} ({row['floor_bound']})",
                    f"{row['seconds'] / row['floor_seconds']:.2f}",
                    f"**{each.speed_up:.2f}**" if name == MINE else "",
                    mebibytes(row["peak_extra_bytes"]),
                    allowed,
                    "-" if row["launches"] is None else str(row["launches"]),
                    f"{row['host_seconds'] * 1e6:.1f}",
                )
            )
    return table(header, rows)


def plot(measured: Sequence[Measurement], title: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    colours = {"eager": "#9aa5b1", "compile": "#5b8fc7", TUNED: "#2f5d92", MINE: "#d9632b"}
    directions = list(dict.fromkeys(each.mine["direction"] for each in measured))
    figure, axes = pyplot.subplots(len(directions), 1, figsize=(11, 3.4 * len(directions)), squeeze=False)
    for axis, direction in zip(axes[:, 0], directions, strict=True):
        shown = [each for each in measured if each.mine["direction"] == direction]
        providers = [name for name in colours if any(name in each.providers for each in shown)]
        width = 0.8 / len(providers)
        for index, provider in enumerate(providers):
            rows = [
                (place, each.providers[provider])
                for place, each in enumerate(shown)
                if provider in each.providers
            ]
            places = [place + (index - (len(providers) - 1) / 2) * width for place, _ in rows]
            heights = [row["seconds"] / row["floor_seconds"] for _, row in rows]
            bars = axis.bar(places, heights, width, label=provider, color=colours[provider])
            if provider == MINE:
                axis.bar_label(bars, fmt="%.1f", fontsize=7)
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 1.5, 2, 3, 5)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter(ticker.NullFormatter())
        axis.set_ylabel("time / floor")
        axis.set_title(direction, fontsize=10)
        labels = [f"{each.mine['id']}\n{each.mine['variant']}" for each in shown]
        axis.set_xticks(range(len(shown)), labels, fontsize=7)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].legend(fontsize=8, frameon=False, ncols=len(colours))
    figure.suptitle(title, fontsize=11)
    figure.tight_layout()
    figure.savefig(path, dpi=120, metadata={"Software": None})  # the same bytes for the same numbers
    pyplot.close(figure)


def write(results: Path, readme: Path, notes: Path) -> None:
    """Put tables and plots of all result files between the marks in ``readme``."""
    files = {path.stem: load(path) for path in sorted(results.glob("*.json"))}
    lines = ["", *targets_table()]
    tiny = [line for content in files.values() for line in tiny_section(content)]
    for content in files.values():
        content["runs"] = {op: run for op, run in content["runs"].items() if not op.endswith(TINY)}
    if files:
        causes = tomllib.loads(notes.read_text()) if notes.exists() else {}
        lines += ["## Summary", "", *summary(files, causes), "## Tables", "", *tiny]
    else:
        lines += ["No results have been written yet.", ""]
    for slug, content in files.items():
        plots = {}
        for op, run in content["runs"].items():
            measured = measurements(op, content["device"], run["rows"])
            if measured:
                path = results / f"{slug}-{op}.png"
                plot(measured, f"{op} on {content['name']}, time over the floor (lower is better)", path)
                plots[op] = path.relative_to(readme.parent).as_posix()
        lines += device_section(slug, content, plots)
    before, begin, rest = readme.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{readme.name}: the marks {BEGIN} and {END} are missing")
    readme.write_text(before + begin + "\n" + "\n".join(lines) + "\n" + end + after)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--readme", type=Path, default=HERE / "README.md")
    parser.add_argument("--notes", type=Path, default=HERE / "notes.toml")
    options = parser.parse_args()
    write(options.results, options.readme, options.notes)


if __name__ == "__main__":
    main()
