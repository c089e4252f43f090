"""The price list as a table of docs/wire.md: what stands between two marks there is replaced."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

BEGIN = "<!-- bench.wire: what follows is written by `make bench-wire` -->"
END = "<!-- bench.wire: end -->"
WIDTH = 118


def table(found: Mapping[str, Any]) -> str:
    """Markdown from what bench.wire wrote."""
    rates: Sequence[float] = found["rates_mbit"]
    heads = [
        "scheme", "T", "up, bytes", "down, bytes", "α", "1 − TV", "τ",
        *(f"TPOT at {rate:g} Mbit/s, ms" for rate in rates), "exact",
    ]  # fmt: skip
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for row in found["rows"]:
        cells = [
            row["label"],
            f"{row['temperature']:g}",
            _size(row["up"]),
            _size(row["down"]),
            _interval(row["alpha"]),
            "" if row["overlap"] is None else f"{row['overlap']:.2f}",
            "" if row["tau"] is None else f"{row['tau']:.2f}",
            *(_time(row, f"{rate:g}") for rate in rates),
            row["exact"],
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", _below(found)])


def _below(found: Mapping[str, Any]) -> str:
    [full] = [row for row in found["rows"] if row["key"] == "full"]
    ids, control = found["drafter_ids"], full["law"]["control"]
    words = (
        f"{found['target']} ({found['precision']}) with {found['drafter']}, "
        f"γ = {found['gamma']}, RTT {found['rtt_ms']:g} ms, "
        f"{found['runtime']} runtime, {found['link']} link, {found['cpu']}, with a load of "
        f"{found['load']:.1f} on {found['cores']} cores when it began. {found['generations']} generations of "
        f"up to {found['max_new_tokens']} tokens a scheme and rate, paired by prompt and seed; TPOT is their "
        "median, and in brackets the median ratio to the coupled one's. Bytes are payloads, of Draft or "
        "DraftQ up and of Verdict and Commit down, per committed "
        "token. α has its 95 % interval over prompts and seeds; 1 − TV is the mean over every position of "
        f"the target's texts. All of q is {full['kept_ids']:.0f} of the drafter's {ids} ids on average, "
        f"those to which 16 bits leave a weight; two bytes for each of the {ids}, without ids, would be "
        f"{2 * ids} bytes a draft. A report that is cut after drawing has χ² p "
        + ("< 1e-12." if control < 1e-12 else f"= {control:.1e}.")
    )
    return textwrap.fill(words, WIDTH)


def _time(row: Mapping[str, Any], rate: str) -> str:
    return f"{row['tpot_ms'][rate]:.1f} ({row['beside_coupled'][rate]:.2f} ×)"


def _size(n: float | None) -> str:
    return "" if n is None else f"{n:,.1f}" if n < 100 else f"{n:,.0f}"


def _interval(estimate: Sequence[float] | None) -> str:
    if estimate is None:
        return ""
    value, low, high = estimate
    return f"{value:.2f} [{low:.2f}, {high:.2f}]"


def replaced(page: str, block: str) -> str:
    """The page with `block` between its marks. Raises ValueError where it has not one of each, in order."""
    if page.count(BEGIN) != 1 or page.count(END) != 1 or page.index(BEGIN) > page.index(END):
        raise ValueError("the page has not both marks of bench.wire, once and in order")
    head, rest = page.split(BEGIN)
    return f"{head}{BEGIN}\n\n{block}\n\n{END}{rest.split(END)[1]}"


def write(path: Path, found: Mapping[str, Any]) -> None:
    page = path.read_text(encoding="utf-8")
    path.write_text(replaced(page, table(found)), encoding="utf-8")
