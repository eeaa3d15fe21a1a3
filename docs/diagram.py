"""The planner's stages as a picture: what each takes from the one before, and what it makes of it."""

from docs.measured import SIDE, svg, text

STAGES = (
    ("FX graph", ("Inductor's post-grad graph,", "after its own passes")),
    ("Canonical copy", ("spellings raised into ops,", "each with where it rounds")),
    ("Matches", ("every rule at every place,", "once for each provider")),
    ("Conflicts", ("what can't be together:", "common nodes, cycles")),
    ("Prices", ("modelled or measured,", "by size, in context")),
    ("Exact plan", ("the most that can be saved,", "with a certificate")),
    ("Verified", ("each fused op beside the", "unfused graph, in float64")),
    ("Rewritten graph", ("Inductor compiles it;", "the rest is as it was")),
)
"""(name, what it says below), in two rows, the second one from right to left."""

BOX, HIGH, GAP, TOP = 187, 76, 26, 20


def planner() -> str:
    """Boxes in two rows, with arrows between them."""
    drawn, half = list[str](), len(STAGES) // 2
    for index, (name, lines) in enumerate(STAGES):
        row, column = divmod(index, half)
        x = SIDE + (half - 1 - column if row else column) * (BOX + GAP)
        y = TOP + row * (HIGH + GAP)
        drawn.append(f'<rect x="{x}" y="{y}" width="{BOX}" height="{HIGH}" rx="5" class="box"/>')
        drawn.append(text(x + BOX / 2, y + 25, name, "head middle"))
        drawn += [text(x + BOX / 2, y + 44 + 16 * line, each, "dim middle") for line, each in enumerate(lines)]
        if index == half - 1:
            drawn.append(_arrow(x + BOX / 2, y + HIGH, 0, 1))
        elif index < len(STAGES) - 1:
            drawn.append(_arrow(x if row else x + BOX, y + HIGH / 2, -1 if row else 1, 0))
    return svg(2 * (TOP + HIGH) + GAP, drawn)


def _arrow(x: float, y: float, right: int, down: int) -> str:
    """From the edge of a box to the next one."""
    long, tip = GAP - 7, 5
    end_x, end_y = x + right * long, y + down * long
    head = f"M{end_x - down * tip} {end_y - right * tip}L{end_x + right * tip} {end_y + down * tip}"
    return f'<path d="M{x} {y}L{end_x} {end_y}{head}L{end_x + down * tip} {end_y + right * tip}" class="arrow"/>'
