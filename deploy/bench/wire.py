"""``carryover bench wire``: messages, index codes and value codes beside what information theory allows."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from deploy.bench import record
from deploy.bench.contenders import heavy_tailed, specifications
from deploy.bench.frames import Size, measure
from deploy.bench.patterns import Pattern, patterns
from deploy.bench.quantisers import Fit, fits
from deploy.bench.tables import Goal, console, show, show_goals

STATED_NUMEL = 25_000_000  # of the goals
RATIO = 0.01
DENSITIES = (0.1, 0.01, 0.001, 0.0001)
IDEAL_INT4, IDEAL_SIGN, SPARSE_SIGN = "topk:0.01+int4", "topk:0.001+sign", "topk:0.01+sign"


def run(numel: int, file: Path | None) -> None:
    """Count, print, and write what was counted to ``file``."""
    record.check_writable(file)
    screen = console()
    vector = heavy_tailed(numel, 0)
    k = max(1, round(RATIO * numel))
    level = float(vector.abs().topk(k, sorted=False).values.min())
    densities = [f"topk:{density:g}+{code}" for density in DENSITIES for code in ("int4", "sign")]
    specs = specifications(RATIO, level)
    sizes = [measure(vector, spec) for spec in specs]
    others = [measure(vector, spec) for spec in densities if spec not in specs]
    _show_sizes(screen, numel, sizes, others)
    found_patterns = patterns(vector)
    _show_patterns(screen, found_patterns)
    found_fits = fits(vector)
    _show_fits(screen, found_fits)
    found_goals = goals({size.spec: size for size in [*sizes, *others]}) if numel == STATED_NUMEL else []
    show_goals(screen, found_goals, f"{STATED_NUMEL:,} values")
    found = {
        "frames": [asdict(size) for size in [*sizes, *others]],
        "indices": [asdict(pattern) for pattern in found_patterns],
        "values": [asdict(fit) for fit in found_fits],
        "goals": [goal.record() for goal in found_goals],
    }
    record.write(file, "bench wire", {"numel": numel}, found)


def goals(sizes: dict[str, Size]) -> list[Goal]:
    """What the bytes are held to."""
    ideal = [
        Goal(f"frame of {spec} to entropy of the selection and bits of the values", sizes[spec].to_ideal, 1.02, "x")
        for spec in (IDEAL_INT4, IDEAL_SIGN)
    ]
    bits = [
        Goal(f"frame of {spec}, bits a value sent", sizes[spec].bits_a_value, most, "")
        for spec, most in (("sign", 1.001), (SPARSE_SIGN, 9.2))
    ]
    return [*ideal, *bits]


def _show_sizes(screen: Console, numel: int, *sections: list[Size]) -> None:
    around = [size.frame_bytes - size.body_bytes for section in sections for size in section]
    screen.print(
        f"{numel:,} float32, cubes of normal numbers; bytes of whole frames, of which {min(around)} to {max(around)} "
        "are not the body"
    )
    rows = [
        [
            [
                size.spec,
                f"{size.sent:,}",
                f"{size.frame_bytes:,}",
                f"{size.ratio:,.1f}x",
                f"{size.bits_an_element:.3g}",
                f"{size.bits_a_value:.3f}",
                size.index_code,
                *(f"{bits:.3f}" for bits in (size.index_bits, size.selection_bits, size.value_bits)),
                f"{size.to_ideal:.3f}x",
            ]
            for size in section
        ]
        for section in sections
    ]
    columns = (
        "specification",
        "sent",
        "frame",
        "times\nsmaller",
        "bits an\nelement",
        "bits a\nvalue",
        "index\ncode",
        "index\nbits",
        "choice\nbits",
        "value\nbits",
        "to\nideal",
    )
    show(screen, columns, *rows)
    screen.print(
        "smaller: than float32. bits a value: of the frame, for each of k values sent. index bits: as they travel.\n"
        "choice bits: log2 C(n,k)/k, without which no choice of k of n elements can be told; 0 where it is drawn from\n"
        "a key. value bits: log2 of the number of symbols, or their entropy (without context) where they are\n"
        "entropy-coded. ideal: k times the sum of choice bits and value bits.\n"
    )


def _show_patterns(screen: Console, found: list[Pattern]) -> None:
    screen.print("bytes of every index code; * the one that a body takes")
    rows = []
    for pattern in found:
        sizes = [f"{'*' if name == pattern.taken else ''}{size:,}" for name, size in pattern.sizes.items()]
        ours = 8 * pattern.sizes[pattern.taken] / pattern.count
        rows.append([pattern.name, f"{pattern.count:,}", *sizes, f"{ours:.3f}", f"{pattern.selection_bits:.3f}"])
    show(screen, ("indices", "count", *found[0].sizes, "bits each", "choice bits"), rows)


def _show_fits(screen: Console, found: list[Fit]) -> None:
    screen.print("mean squared errors of value codes: of Lloyd-Max to the mean square, of the others to Lloyd-Max")
    rows = [
        [
            *(fit.values, f"{fit.count:,}", fit.code, f"{fit.magnitudes}"),
            *(f"{fit.lloyd_max:.3g}", f"{fit.ours:.3f}x", f"{fit.uniform:.3g}x"),
        ]
        for fit in found
    ]
    columns = ("values", "count", "code", "magnitudes", "Lloyd-Max", "the code", "uniform grid")
    show(screen, columns, rows)
    screen.print("uniform grid: equal steps from zero to the largest magnitude, rounded to nearest.\n")
