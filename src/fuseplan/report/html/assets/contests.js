// Who takes whose place, by how many microseconds, and from which cost on it would be otherwise.

/** Under the headline: what the first policy applies and saves, and what a reader has to know of the run. */
function openSummary() {
    const policy = POLICIES[0];
    const { warnings, breaks } = VIEW;
    const counts = policy.rules.flatMap(([fused], index) =>
        fused ? [[RULES[index], countsOfStep(policy, index)]] : [],
    );
    const saved = policy.ranges.map((range, index) => [
        index ? ", " : null,
        el("b", us(range.saved)),
        ` of ${bare(range.unfused)} ${index ? "" : "a step "}at ${spanText(VIEW.ranges[index])}`,
    ]);
    const proven = policy.ranges.every((range) => range.proof?.gap === 0);
    const fusions = counts.map(([rule, count], index) => [index ? " + " : null, `${count} `, ruleName(rule)]);
    if (counts.length) {
        const proof = proven ? "; no legal selection saves more (gap 0)" : "";
        refill(byId("summary"), policyLabel(policy), " applies ", fusions, ` and saves `, saved, ` tokens${proof}.`);
    }
    const alerts = [...warnings.map((each) => each.detail), ...breaks.map((reason) => `graph break: ${reason}`)];
    const more = alerts.length > 3 ? [el("a", { href: "#run" }, `${alerts.length - 3} more`)] : [];
    refill(
        byId("alerts"),
        [...alerts.slice(0, 3), ...more].map((text) => el("p", nearGlyph(false), el("span", text))),
    );
}

/** At the top of the page: a row for each rule that a fixed order makes lose. */
function openVerdicts() {
    const { verdicts } = VIEW;
    if (!verdicts.length) return;
    const spans = VIEW.ranges;
    const rows = verdicts.map((row) => {
        const policy = POLICIES[row.policy];
        return el(
            "tr",
            el(
                "th",
                { scope: "row" },
                el(
                    "button.link.lettered",
                    { onclick: (event) => showVerdict(row, event) },
                    el("span.letter", policy.letter),
                    code(policy.name),
                ),
            ),
            el("td", ruleName(row.loser)),
            el(
                row.state === "starved" ? "td.figure.bad" : "td.figure",
                el("b", number(row.fused)),
                ` of ${number(row.matched)}`,
                row.state === "starved" ? el("small.bad", "✕ starved") : null,
            ),
            el(
                "td",
                row.winners.map(([rule, count]) => el("div", ruleName(rule), ` × ${number(count)}`)),
                el("small", code(row.where || row.op)),
            ),
            el(
                row.lost_us < 0 ? "td.figure.bad" : "td.figure",
                row.lost_us === null ? "–" : marginText(row.lost_us * 1000, 2),
            ),
            row.behind_us.map((each) =>
                el("td.figure", each === 0 ? "equal" : `${each > 0 ? "−" : "+"}${number(Math.abs(each), 1)}`),
            ),
        );
    });
    refill(byId("verdicts"), reachable(el("div.scroll", el("table.verdicts", verdictHead(spans), el("tbody", rows)))));
}

/** Two lines of headings: the last columns have one in common. */
function verdictHead(spans) {
    const high = (title, kind) => el(kind ? `th.${kind}` : "th", { scope: "col", rowspan: 2 }, title);
    return el(
        "thead",
        el(
            "tr",
            high("under"),
            high("rule"),
            high("fires", "figure"),
            high("its place goes to"),
            high("with the loser instead", "figure"),
            el("th", { scope: "colgroup", colspan: spans.length }, "µs a step, against ", policyLabel(POLICIES[0])),
        ),
        el(
            "tr",
            spans.map((span) => el("th.figure", { scope: "col" }, `${spanText(span)} tokens`)),
        ),
    );
}

function showVerdict(row, event) {
    change({ policy: row.policy });
    const conflict = POLICIES[row.policy].conflicts.findIndex((each) => each.loser === row.loser);
    if (conflict >= 0) select({ kind: "conflict", policy: row.policy, conflict }, event);
}

function openConflicts() {
    if (!POLICIES.some((policy) => policy.conflicts.length)) return;
    byId("conflicts").hidden = false;
    listen(["policy"], drawConflicts);
    drawConflicts();
}

function drawConflicts() {
    const policy = policyNow();
    refill(
        byId("conflicts-note"),
        "under ",
        el("b", policyLabel(policy)),
        ", over all graphs and ranges; the mean of a place",
    );
    if (!policy.conflicts.length) {
        refill(
            byId("conflicts-table"),
            el(
                "p.note",
                policy.name === "off"
                    ? "Nothing is applied, so nothing is in the way."
                    : "No match stands in another's way.",
            ),
        );
        return;
    }
    const columns = [
        "takes it",
        "loses it",
        "contested op",
        ["places", "figure"],
        "where",
        ["with the loser instead", "figure"],
        ["loser wins below", "figure"],
    ];
    refill(
        byId("conflicts-table"),
        table(
            "conflicts",
            columns,
            policy.conflicts.map((row, index) => conflictRow(policy, row, index)),
        ),
    );
}

function conflictRow(policy, row, index) {
    const open = (event) => select({ kind: "conflict", policy: policy.index, conflict: index }, event);
    return el(
        "tr",
        el("td", row.winner === "unfused" ? el("span.faint", "left to Inductor") : ruleName(row.winner)),
        el("td", el("button.link", { "data-key": `conflict ${index}`, onclick: open }, "✕ ", ruleName(row.loser))),
        el("td", code(row.op)),
        el("td.figure", number(row.count)),
        el("td", code(row.where)),
        el(
            row.lost_us < 0 ? "td.figure.bad" : "td.figure",
            row.lost_us === null ? "can't be applied" : marginText(row.lost_us * 1000, 2),
        ),
        el(
            "td.figure",
            row.flips_at_us === null
                ? el("span.faint", { title: neverText(policy) }, policy.order.length ? "the order decides" : "never")
                : `${number(row.flips_at_us, 2)} µs`,
        ),
    );
}

const neverText = (policy) =>
    policy.order.length
        ? "the order decides, whatever its op takes"
        : "no time of its op is short enough, or it isn't known";

/** What force and forbid cost, and what they changed. */
function openChanges() {
    const { changes } = VIEW;
    if (!changes) return;
    const rules = [
        ...changes.force.map((text) => ["forced", text]),
        ...changes.forbid.map((text) => ["forbidden", text]),
    ];
    const rows = changes.rows.map((row) =>
        el(
            "tr",
            el("td", code(row.before)),
            el("td", code(row.after)),
            el("td.figure", number(row.count)),
            el("td", code(row.where)),
        ),
    );
    refill(
        byId("changes"),
        el(
            "div.changes",
            el("h3", "What force and forbid change"),
            el(
                "p",
                rules.map(([word, text]) => el("span.tag", `${word} `, code(text))),
            ),
            el(
                "p",
                "The plan saves ",
                VIEW.ranges.map((span, index) => [
                    index ? ", " : null,
                    el("b", `${number(Math.abs(changes.lost_us[index]), 1)} µs`),
                    ` ${changes.lost_us[index] < 0 ? "more" : "less"} at ${spanText(span)} tokens`,
                ]),
                ".",
            ),
            rows.length
                ? reachable(
                      el(
                          "div.scroll",
                          table("diff", ["without them", "with them", ["places", "figure"], "where"], rows),
                      ),
                  )
                : el("p.note", "The same is applied at the same places."),
        ),
    );
}
