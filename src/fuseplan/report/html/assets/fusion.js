// The details of a fusion: what became of it, what its place takes under each alternative, and who else wants it.

function fusionDetails({ fusion: id }) {
    const fusion = FUSIONS[id];
    const fate = fateOf(fusion, STATE.policy, STATE.range);
    const kind = { applied: "Fused region", lost: "Candidate that lost", none: "Candidate" }[fate.state];
    return {
        kind,
        title: ruleName(fusion.rule),
        parts: [
            el("p.sub", code(fusion.op), " by ", el("b", fusion.provider)),
            verdictOf(fate),
            alternativesOf(fusion.cls, fusion),
            part(
                "Takes",
                list("ul.links", fusion.boxes, (index) => boxLink(fusion.graph, index)),
                nodeNames(fusion.nodes),
            ),
            part("Who wants this place", rivalsOf(fusion)),
            part("Under each policy", fatesOf(fusion)),
            part(
                "Place",
                facts([
                    ["module", fusion.source && code(fusion.source)],
                    ["line", GRAPHS[fusion.graph].boxes[homeOf(fusion)]?.line],
                    ["contested op", code(fusion.contested)],
                    ["site", code(fusion.site)],
                    ["named after", code(fusion.anchor)],
                    ["priced", fusion.provenance === "assumed" ? "assumed" : fusion.provenance],
                    ["rounding", fusion.before && `graph ${fusion.before}, kernel ${fusion.after}`],
                ]),
            ),
        ],
    };
}

/** What happened to a fusion under the policy at hand, in words and figures. */
function verdictOf(fate) {
    const where = `in range ${spanText(spanNow())}`;
    if (fate.state === "none") return el("p.verdict", `No candidate of ${policyTitle(policyNow())} ${where}.`);
    if (fate.state === "applied") {
        return el(
            "p.verdict.good",
            fate.saving === null
                ? `Applied ${where}; nothing priced it.`
                : [
                      fate.fusion.provenance === "assumed" ? "Taken to save " : "Saves ",
                      el("b", us(fate.saving, 2)),
                      ` a step here, ${where}, weighted over its sizes.`,
                  ],
        );
    }
    const winners = [...new Map(fate.winners.map((fusion) => [fusion.id, fusion])).values()];
    return el(
        fate.lost < 0 ? "div.verdict.bad" : "div.verdict",
        el(
            "p",
            fate.forbidden
                ? "Ruled out by forbid."
                : winners.length
                  ? ["Blocked by ", winners.map((fusion, index) => [index ? ", " : null, fusionLink(fusion)]), "."]
                  : "Nothing is in its way; leaving the place to Inductor is better.",
        ),
        el(
            "p",
            fate.lost === null
                ? "No selection with it is legal."
                : fate.lost === 0
                  ? "With it the same would be saved."
                  : ["With it the step would be ", el("b", marginText(fate.lost, 2)), ` ${where}.`],
        ),
        el("p", flipOf(fate)),
    );
}

/** From which time of its op on a fusion would be applied. */
function flipOf(fate) {
    if (policyNow().order.length) return "The order decides that, whatever its op takes.";
    if (fate.flips === null) return "No time of its op is short enough to change that, or its time isn't known.";
    return ["It would be chosen if its op took at most ", el("b", us(fate.flips, 2)), "."];
}

/** Every fusion at the same site, and how it fares. */
function rivalsOf(fusion) {
    const rivals = FUSIONS.filter((each) => each.graph === fusion.graph && each.site === fusion.site);
    const rank = { applied: 0, lost: 1, none: 2 };
    const fates = rivals
        .map((each) => fateOf(each, STATE.policy, STATE.range))
        .sort((a, b) => rank[a.state] - rank[b.state] || (a.lost ?? Infinity) - (b.lost ?? Infinity));
    const row = (fate) => [fusionLink(fate.fusion), fateText(fate)];
    return list("ul.fates", fates, row, (fate) => fate.fusion === fusion);
}

function fateText(fate) {
    if (fate.state === "applied")
        return el("span.figure.good", "applied", fate.saving === null ? null : `, saves ${us(fate.saving, 2)}`);
    if (fate.state === "none") return el("span.figure.faint", "not considered");
    return el(
        fate.lost < 0 ? "span.figure.bad" : "span.figure",
        fate.forbidden ? "forbidden" : marginText(fate.lost, 2),
    );
}

function fatesOf(fusion) {
    const row = (policy) => [
        el(
            "button.link",
            { onclick: () => change({ policy: policy.index }) },
            el("span.letter", policy.letter),
            " ",
            shortPolicy(policy),
        ),
        fateText(fateOf(fusion, policy.index, STATE.range)),
    ];
    return list("ul.fates", POLICIES, row, (policy) => policy.index === STATE.policy);
}

/** The alternatives of a class of places as bars, at one of the sizes that they were priced at. */
function alternativesOf(cls, fusion, policy = STATE.policy) {
    const span = spanNow();
    const rows = cls ? costsOf(cls).filter((row) => isServed(row.tokens, span)) : [];
    if (!rows.length) return null;
    const sizes = [...new Set(rows.map((row) => row.tokens))];
    const now = pointNow()?.tokens || sizes[Math.floor(sizes.length / 2)];
    const nearest = sizes.reduce((best, size) =>
        Math.abs(Math.log(size / now)) < Math.abs(Math.log(best / now)) ? size : best,
    );
    const body = el("div");
    const buttons = sizes.map((size) =>
        el("button", { "aria-pressed": String(size === nearest), onclick: () => show(size) }, number(size)),
    );
    const show = (size) => {
        buttons.forEach((button, index) => button.setAttribute("aria-pressed", String(sizes[index] === size)));
        refill(
            body,
            alternativeBars(
                rows.filter((row) => row.tokens === size),
                fusion,
                policy,
            ),
            el(
                "button.link.rows-link",
                { onclick: () => showCosts({ cls, tokens: size }) },
                "cost rows behind these figures",
            ),
        );
    };
    show(nearest);
    return part(
        "Time of the place by alternative",
        el("div.sizes", { role: "group", "aria-label": "Tokens" }, el("span", "tokens"), buttons),
        body,
    );
}

function alternativeBars(rows, fusion, policy) {
    const applied = new Set(
        choiceOf(policy, STATE.range, fusion.graph)
            .applied.filter((each) => each.fusion.site === fusion.site)
            .map((each) => nameOf(each.fusion)),
    );
    const most = Math.max(...rows.map((row) => row.ns));
    const unfused = rows.find((row) => row.alternative === "unfused");
    const now = applied.size ? applied : new Set(["unfused"]);
    return el(
        "ul.bars",
        [...rows]
            .sort((a, b) => a.ns - b.ns)
            .map((row) => {
                const [rule, , provider] = row.alternative.split(" ");
                const name =
                    row === unfused
                        ? el("span", "unfused, by Inductor")
                        : el("span", ruleName(rule), ` ${provider || ""}`);
                const note = [
                    now.has(row.alternative) ? "applied" : null,
                    row.alternative === nameOf(fusion) ? "this one" : null,
                ]
                    .filter(Boolean)
                    .join(", ");
                return el(
                    row.alternative === nameOf(fusion) ? "li.now" : "li",
                    el("div", name, note ? el("em", note) : null, el("b.figure", us(row.ns, 2))),
                    el("div.bar-line", termBar(row, most)),
                    unfused && row !== unfused
                        ? el(
                              "small",
                              marginText(row.ns - unfused.ns, 2)
                                  .replace("worse", "more than unfused")
                                  .replace("better", "saved"),
                          )
                        : null,
                );
            }),
    );
}

const nameOf = (fusion) => `${fusion.rule} ${fusion.op} ${fusion.provider}`;
