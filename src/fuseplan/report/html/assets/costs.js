// The rows behind the figures: times of alternatives, kernel by kernel, and the constants that they were made of.

const FILTER = { text: "", site: "", tokens: "" };

function openCosts() {
    openConstants();
    if (!COSTS.length) return;
    byId("costs").hidden = false;
    const sites = [...new Set(COSTS.map((row) => row.site))];
    const tokens = [...new Set(COSTS.map((row) => row.tokens))].sort((a, b) => a - b);
    const text = el("input", {
        type: "search",
        id: "costs-filter",
        placeholder: "Filter rows",
        "aria-label": "Filter cost rows",
        oninput: () => filterCosts({ text: text.value }),
    });
    const site = el(
        "select",
        { id: "costs-site", "aria-label": "Class of places", onchange: () => filterCosts({ site: site.value }) },
        el("option", { value: "" }, "all classes of places"),
        sites.map((each) => el("option", { value: each }, each)),
    );
    const size = el(
        "select",
        { id: "costs-tokens", "aria-label": "Tokens", onchange: () => filterCosts({ tokens: size.value }) },
        el("option", { value: "" }, "all sizes"),
        VIEW.ranges.length > 1
            ? VIEW.ranges.map((span, index) => el("option", { value: `range ${index}` }, `range ${spanText(span)}`))
            : null,
        tokens.map((each) => el("option", { value: String(each) }, `${number(each)} tokens`)),
    );
    const clear = el("button.quiet", { onclick: () => filterCosts({ text: "", site: "", tokens: "" }) }, "Clear");
    refill(byId("costs-tools"), text, site, size, clear, el("span", { id: "costs-count", role: "status" }));
    drawCosts();
}

/** Narrows the table, and the controls above it say how. */
function filterCosts(parts) {
    Object.assign(FILTER, parts);
    byId("costs-filter").value = FILTER.text;
    byId("costs-site").value = FILTER.site;
    byId("costs-tokens").value = FILTER.tokens;
    drawCosts();
}

/** From a figure elsewhere to the rows that it came from. */
function showCosts({ cls = "", range = null, tokens = "", text = "" }) {
    const site = cls && !COSTS.some((row) => row.site === cls) ? costsOf(cls)[0]?.site || "" : cls;
    filterCosts({
        text,
        site,
        tokens: range === null ? String(tokens) : VIEW.ranges.length > 1 ? `range ${range}` : "",
    });
    goTo(byId("costs"));
    announce(byId("costs-count").textContent);
}

function isShown(row) {
    const words = FILTER.text.toLowerCase().split(/\s+/).filter(Boolean);
    const text = `${row.site} ${row.alternative} ${row.tokens} ${row.provenance} ${row.origin.join(" ")}`.toLowerCase();
    const [kind, index] = FILTER.tokens.split(" ");
    const inSize =
        !FILTER.tokens ||
        (kind === "range" ? isServed(row.tokens, VIEW.ranges[index]) : String(row.tokens) === FILTER.tokens);
    return inSize && (!FILTER.site || row.site === FILTER.site) && words.every((word) => text.includes(word));
}

function drawCosts() {
    const rows = COSTS.filter(isShown);
    byId("costs-count").textContent = `${number(rows.length)} of ${plural(COSTS.length, "row")}`;
    const spread = COSTS.some((row) => row.spread);
    const columns = [
        "alternative",
        "fused op",
        ["tokens", "figure"],
        ["time, µs", "figure"],
        ...(spread ? [["spread", "figure"]] : []),
        ["saves, µs", "figure"],
        [termLegend(), "terms"],
        ...TERMS.map((term) => [term, "figure"]),
        "kernels",
        "provenance",
    ];
    const body = [];
    const most = new Map();
    for (const row of rows)
        most.set(`${row.site} ${row.tokens}`, Math.max(row.ns, most.get(`${row.site} ${row.tokens}`) || 0));
    rows.forEach((row, index) => {
        if (row.site !== rows[index - 1]?.site) {
            body.push(
                el(
                    "tr.class",
                    el(
                        "th",
                        { colspan: columns.length, scope: "colgroup" },
                        code(row.site),
                        el("span", ` ${plural(row.places, "place")} in a graph and range`),
                    ),
                ),
            );
        }
        body.push(
            costRow(
                row,
                most.get(`${row.site} ${row.tokens}`),
                row.tokens !== rows[index - 1]?.tokens || row.site !== rows[index - 1]?.site,
            ),
        );
    });
    refill(byId("costs-table"), rows.length ? table("costs", columns, body) : el("p.note", "No row has all of that."));
}

function costRow(row, most, first) {
    const [rule, op, provider] = row.alternative.split(" ");
    const plain = row.alternative.split(" ").length === 3;
    const unfused = COSTS.find(
        (each) => each.site === row.site && each.tokens === row.tokens && each.alternative === "unfused",
    );
    const saved = unfused && row !== unfused ? unfused.ns - row.ns : null;
    return el(
        first ? "tr.first" : "tr",
        el("td", plain ? [ruleName(rule), el("span.faint", ` ${provider}`)] : code(row.alternative)),
        el("td.faint", plain ? code(op) : null),
        el("td.figure", number(row.tokens)),
        el("td.figure", el("b", bare(row.ns, 2))),
        COSTS.some((each) => each.spread) ? el("td.figure", row.spread ? bare(row.spread, 2) : "–") : null,
        el(saved < 0 ? "td.figure.worse" : "td.figure", saved === null ? "" : bare(saved, 2)),
        el("td.terms", termBar(row, most)),
        row.terms.map((ns) => el("td.figure", row.runs.length ? (ns ? bare(ns, 2) : el("span.faint", "0")) : "–")),
        el("td", kernelList(row)),
        el(
            "td",
            row.provenance,
            row.origin.map((text) => el("small", text)),
        ),
    );
}

const termLegend = () =>
    el(
        "span.term-legend",
        TERMS.map((term) => el("span", el("i.term", { "data-term": term }), term)),
    );

/** The terms of a modelled time as parts of a bar; a measured one is one part. */
function termBar(row, most) {
    const parts = row.runs.length ? row.terms.map((ns, index) => [TERMS[index], ns]) : [["measured", row.ns]];
    const words = parts
        .filter(([, ns]) => ns)
        .map(([term, ns]) => `${term} ${us(ns, 2)}`)
        .join(", ");
    return el(
        "span.term-bar",
        { role: "img", "aria-label": words, title: words },
        parts
            .filter(([, ns]) => ns > 0)
            .map(([term, ns]) =>
                el("i.term", { "data-term": term, style: { width: `${(100 * ns) / Math.max(1, most)}%` } }),
            ),
    );
}

/** The kernels of a modelled time, those that are alike in one line. */
function kernelList(row) {
    if (!row.runs.length) return null;
    const count = row.runs.reduce((sum, run) => sum + run.count, 0);
    return el(
        "details.kernels",
        el("summary", plural(count, "kernel")),
        el(
            "ul",
            row.runs.map(({ kernel, count: times }) => {
                const terms = TERMS.map((term, index) => [term, kernel[index + 1]])
                    .filter(([, ns]) => ns)
                    .map(([term, ns]) => `${term} ${bare(ns, 3)}`);
                return el("li", times > 1 ? `${times} × ` : "", code(textAt(kernel[0])), ` ${terms.join(" + ")} µs`);
            }),
        ),
    );
}

function openConstants() {
    if (!VIEW.constants.length) return;
    byId("constants").hidden = false;
    const digits = (value) => (Number.isInteger(value) ? 0 : Math.abs(value) < 10 ? 3 : 1);
    refill(
        byId("constants-table"),
        table(
            "constants",
            ["constant", ["value", "figure"], "unit", "source"],
            VIEW.constants.map(([name, value, unit, source]) =>
                el(
                    "tr",
                    el("td", code(name)),
                    el("td.figure", number(value, digits(value))),
                    el("td", unit),
                    el("td.wide", source),
                ),
            ),
        ),
    );
}
