// Where a rule nearly matches, and what was on without effect.

const NEARNESS = {
    refused: "all its ops, a check refuses",
    obstructed: "something stands between its ops",
    unrecognized: "looks like one of its ops",
    missing: "an op that other layers have is missing",
    declined: "one provider declines, another takes it",
    absent: "one op, nothing like the rest",
};

function openMisses() {
    if (!VIEW.misses.length) return;
    byId("misses").hidden = false;
    const columns = ["how near", "rule", "in the way", ["places", "figure"], "where", "fix"];
    refill(byId("misses-table"), table("misses", columns, VIEW.misses.map(missRow)));
}

const isFaint = (miss) => miss.nearness === "declined" || miss.nearness === "absent";

function missRow(miss, index) {
    const open = (event) => select({ kind: "miss", miss: index }, event);
    return el(
        isFaint(miss) ? "tr.quiet-row" : "tr",
        el("td", nearGlyph(isFaint(miss)), " ", el("b", miss.nearness), el("small", NEARNESS[miss.nearness])),
        el(
            "td",
            miss.rule ? ruleName(miss.rule) : code(miss.op || "–"),
            miss.provider ? el("small", miss.provider) : null,
        ),
        el("td.cause", el("button.link", { onclick: open }, miss.detail), lineOfCode(miss)),
        el("td.figure", number(miss.count)),
        el("td", code(miss.where || miss.sites || "–")),
        el("td", miss.fix || el("span.faint", "–")),
    );
}

/** The line of the user's model that is in the way. */
function lineOfCode(miss) {
    if (!miss.line && !miss.code) return null;
    return el("div.source-line", miss.line ? el("span", miss.line) : null, miss.code ? el("code", miss.code) : null);
}

/** Warnings, notes, graph breaks, proofs, and where the time went. */
function openRun() {
    const { warnings, notes, breaks, stages, recognized } = VIEW;
    const item = (name, content) => (content ? el("div.fact", el("h3", name), content) : null);
    const texts = (found) => list("ul", found, (text) => text);
    const times = [["build and trace", VIEW.trace_ns], ...stages];
    refill(
        byId("run-body"),
        item("Warnings", texts(warnings.map((each) => [each.detail, each.fix ? ` (${each.fix})` : ""].join("")))),
        item("Graph breaks", texts(breaks)),
        item("Notes", texts(notes)),
        item("Recognised ops", counted(recognized)),
        item(
            "Time",
            list("ul.counts", times, ([name, ns]) => [el("b", time(ns)), ` ${name}`]),
        ),
        item("Proof of the plan", proofs()),
    );
}

function proofs() {
    const policy = POLICIES.find((each) => each.ranges.some((range) => range.proof));
    if (!policy) return null;
    const rows = policy.ranges
        .map((range, index) => ({ ...range.proof, span: VIEW.ranges[index], there: range.proof }))
        .filter((row) => row.there);
    const columns = [
        "range",
        ["saves", "figure"],
        ["bound", "figure"],
        ["gap", "figure"],
        ["components", "figure"],
        ["classes", "figure"],
        ["solver", "figure"],
        "prices",
        "digest",
    ];
    return reachable(
        el(
            "div.scroll",
            table(
                "proof",
                columns,
                rows.map((row) =>
                    el(
                        "tr",
                        el("td", spanText(row.span)),
                        el("td.figure", us(row.objective)),
                        el("td.figure", us(row.bound)),
                        el("td.figure", row.gap === 0 ? "0" : `${number(100 * row.gap, 2)} %`),
                        el("td.figure", number(row.components)),
                        el("td.figure", number(row.classes)),
                        el("td.figure", time(row.plan_ns)),
                        el("td", row.prices.join(", ")),
                        el(
                            "td",
                            el(
                                "span.code",
                                { title: row.digests.join("\n") },
                                row.digests.map((each) => each.slice(0, 10)).join(" "),
                            ),
                        ),
                    ),
                ),
            ),
            el("p.note", "Gap 0: no legal selection saves more."),
        ),
    );
}
