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
    const columns = [
        ["how near", ""],
        ["rule", ""],
        ["in the way", ""],
        ["places", "figure"],
        ["where", ""],
        ["fix", ""],
    ];
    refill(byId("misses-table"), table("misses", columns, VIEW.misses.map(missRow)));
}

const isFaint = (miss) => miss.nearness === "declined" || miss.nearness === "absent";

function missRow(miss, index) {
    const open = (event) => select({ kind: "miss", miss: index }, event);
    return el(
        isFaint(miss) ? "tr.quiet-row" : "tr",
        null,
        el(
            "td",
            null,
            nearGlyph(isFaint(miss)),
            " ",
            el("b", null, miss.nearness),
            el("small", null, NEARNESS[miss.nearness]),
        ),
        el(
            "td",
            null,
            miss.rule ? ruleName(miss.rule) : code(miss.op || "–"),
            miss.provider ? el("small", null, miss.provider) : null,
        ),
        el("td.cause", null, el("button.link", { type: "button", onclick: open }, miss.detail), lineOfCode(miss)),
        el("td.figure", null, number(miss.count)),
        el("td", null, code(miss.where || miss.sites || "–")),
        el("td", null, miss.mend || el("span.faint", null, "–")),
    );
}

/** The line of the user's model that is in the way. */
function lineOfCode(miss) {
    if (!miss.line && !miss.code) return null;
    return el(
        "div.source-line",
        null,
        miss.line ? el("span", null, miss.line) : null,
        miss.code ? el("code", null, miss.code) : null,
    );
}

/** Warnings, notes, graph breaks, proofs, and where the time went. */
function openRun() {
    const { warnings, notes, breaks, stages, recognized } = VIEW;
    const item = (name, content) => (content ? el("div.fact", null, el("h3", null, name), content) : null);
    const list = (texts) =>
        texts.length
            ? el(
                  "ul",
                  null,
                  texts.map((text) => el("li", null, text)),
              )
            : null;
    refill(
        byId("run-body"),
        item("Warnings", list(warnings.map((each) => [each.detail, each.mend ? ` (${each.mend})` : ""].join("")))),
        item("Graph breaks", list(breaks)),
        item("Notes", list(notes)),
        item(
            "Recognised ops",
            recognized.length
                ? el(
                      "ul.counts",
                      null,
                      recognized.map(([name, count]) => el("li", null, el("b", null, number(count)), " ", code(name))),
                  )
                : null,
        ),
        item(
            "Time",
            el(
                "ul.counts",
                null,
                [["build and trace", VIEW.trace_ns], ...stages].map(([name, ns]) =>
                    el("li", null, el("b", null, time(ns)), ` ${name}`),
                ),
            ),
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
        ["range", ""],
        ["saves", "figure"],
        ["bound", "figure"],
        ["gap", "figure"],
        ["components", "figure"],
        ["classes", "figure"],
        ["solver", "figure"],
        ["prices", ""],
        ["digest", ""],
    ];
    return reachable(
        el(
            "div.scroll",
            null,
            table(
                "proof",
                columns,
                rows.map((row) =>
                    el(
                        "tr",
                        null,
                        el("td", null, spanText(row.span)),
                        el("td.figure", null, us(row.objective)),
                        el("td.figure", null, us(row.bound)),
                        el("td.figure", null, row.gap === 0 ? "0" : `${number(100 * row.gap, 2)} %`),
                        el("td.figure", null, number(row.components)),
                        el("td.figure", null, number(row.classes)),
                        el("td.figure", null, time(row.plan_ns)),
                        el("td", null, row.prices.join(", ")),
                        el(
                            "td",
                            null,
                            el(
                                "span.code",
                                { title: row.digests.join("\n") },
                                row.digests.map((each) => each.slice(0, 10)).join(" "),
                            ),
                        ),
                    ),
                ),
            ),
            el("p.note", null, "Gap 0: no legal selection saves more."),
        ),
    );
}
