// Policies side by side: what each applies, what it saves at the size at hand, and who takes a contested place.

function openPolicies() {
    if (!POLICIES.length) return;
    byId("policies").hidden = false;
    listen(["policy", "size", "range"], drawPolicies);
    drawPolicies();
}

const policyLabel = (policy) => [el("span.letter", { "aria-hidden": "true" }, policy.letter), " ", policyTitle(policy)];

function drawPolicies() {
    const focused = document.activeElement?.name === "policy";
    const contest = contestOf(STATE.range);
    const point = pointNow();
    const rules = VIEW.rules.map((rule, index) => ({ ...rule, index })).filter((rule) => rule.matched);
    const several = VIEW.ranges.length > 1;
    const columns = [
        "policy",
        ...(contest ? ["at a contested place"] : []),
        ...rules.map((rule) => [ruleName(rule.name), "figure"]),
        ...(point
            ? [
                  [`saved at ${number(point.tokens)}`, "figure"],
                  [`of the ops’ ${bare(point.unfused)}`, "figure"],
                  ...(point.step ? [[`of a step’s ${bare(point.step)}, about`, "figure"]] : []),
              ]
            : []),
        [several ? `saved, plan of ${spanText(spanNow())}` : "saved", "figure"],
        ["against A", "figure"],
    ];
    refill(
        byId("policies-table"),
        table(
            "policies",
            columns,
            POLICIES.map((policy) => policyRow(policy, rules, contest, point)),
        ),
    );
    refill(
        byId("policies-note"),
        "fired of matched in ",
        several ? `range ${spanText(spanNow())}, below it range by range where that differs` : "the range",
        contest ? `; the place shown is ${contest.source || contest.site}` : null,
        contest?.alike > 1 ? `, one of ${contest.alike} alike` : null,
        "; times in µs a step; the ops are those that fusions contend for, unfused, and a step is estimated",
    );
    if (focused) byId("policies-table").querySelector("input:checked")?.focus();
}

function policyRow(policy, rules, contest, point) {
    const range = policy.ranges[STATE.range];
    return el(
        policy.index === STATE.policy ? "tr.now" : "tr",
        el("th", { scope: "row" }, policyPick(policy)),
        contest ? el("td", contestStrip(contest, policy)) : null,
        rules.map((rule) => el("td.figure", firedOf(policy, rule, range))),
        point ? savedCells(policy, point) : null,
        el("td.figure", savedOf(range)),
        againstFirst(policy, range),
    );
}

function policyPick(policy) {
    const input = el("input", {
        type: "radio",
        name: "policy",
        value: policy.index,
        checked: policy.index === STATE.policy,
        onchange: () => change({ policy: policy.index }),
    });
    const more = policy.counterfactual ? el("small", "nothing forced or forbidden") : null;
    const name = el("span.policy-name", code(policy.name), more);
    return el("label.policy", input, el("span.letter", policy.letter), lineSample(policy), name);
}

/** What a policy saves if it has to serve the size at hand alone; the most of all is bold. */
function savedCells(policy, point) {
    const at = policy.counterfactual ? null : point.at[policy.index];
    if (!at) return [1, 2, ...(point.step ? [3] : [])].map(() => el("td.figure", "–"));
    const most = Math.max(...point.at.map((each) => each.saved));
    const text = at.saved === most && most > 0 ? el("b", bare(at.saved)) : bare(at.saved);
    const priced = COSTS.some((row) => row.tokens === point.tokens);
    return [
        el("td.figure", priced ? rowsLink({ tokens: point.tokens }, "size", text) : text),
        el("td.figure", share(at.saved, point.unfused)),
        ...(point.step ? [el("td.figure", share(at.saved, point.step))] : []),
    ];
}

/** A figure that leads to the rows it was computed from. */
function rowsLink(rows, what, text) {
    const title = `show the cost rows of this ${what}`;
    return el("button.link", { title, onclick: () => showCosts(rows) }, text);
}

/** What the plan of the range saves. */
function savedOf(range) {
    return range.sizes.length && COSTS.length
        ? rowsLink({ range: STATE.range }, "range", bare(range.saved))
        : bare(range.saved);
}

function againstFirst(policy, range) {
    const behind = POLICIES[0].ranges[STATE.range].saved - range.saved;
    const text = behind === 0 ? "equal" : `${behind > 0 ? "−" : "+"}${bare(Math.abs(behind))}`;
    return el(behind > 0 ? "td.figure.worse" : "td.figure", policy.index === 0 ? "" : text);
}

const lineSample = (policy) =>
    !POINTS.length
        ? null
        : policy.counterfactual
          ? el("span.sample")
          : svg(
                "svg.sample",
                { width: 26, height: 8, viewBox: "0 0 26 8", "aria-hidden": "true" },
                svg(policy.index === STATE.policy ? "path.line.now" : "path.line", {
                    d: "M1 4 H25",
                    "data-dash": policy.index === STATE.policy ? null : policy.index % 5,
                }),
            );

const STATE_TEXT = {
    starved: "✕ starved",
    covered: "in a composed rule",
    outdone: "✕ outdone",
    worth: "not worth it",
    forbidden: "forbidden",
    unpriced: "no price is known",
    unsure: "not sure to gain",
};

/** How often a rule fires in a step: "36", or "36/0" range by range where that differs. */
function countsOfStep(policy, index) {
    const counts = policy.ranges.map((range) => number(range.rules[index][0]));
    return new Set(counts).size > 1 ? counts.join("/") : counts[0];
}

/** "36 of 36" for the range at hand, all ranges below where they differ, and a word where it fires nowhere. */
function firedOf(policy, rule, range) {
    const [, matched, state] = policy.rules[rule.index];
    if (state === "unlisted") return el("span.faint", "not listed");
    if (!matched) return el("span.faint", "–");
    const [here, there] = range.rules[rule.index];
    const word = STATE_TEXT[state];
    return [
        el(
            state === "starved" ? "span.fired.bad" : here ? "span.fired" : "span.fired.none",
            el("b", number(here)),
            ` of ${number(there)}`,
        ),
        word
            ? el(state === "starved" ? "small.bad" : "small", word)
            : countsOfStep(policy, rule.index).includes("/")
              ? el("small", countsOfStep(policy, rule.index))
              : null,
    ];
}

/** The place that shows best how policies differ: where a fixed order makes a rule lose, and that occurs most. */
const contestOf = remembered((range) => {
    const places = new Map();
    for (const policy of POLICIES) {
        for (const graph of GRAPHS) {
            for (const loss of losersOf(policy.index, range, graph.index)) {
                if (!loss.winners.length) continue;
                const key = `${graph.index} ${loss.fusion.site}`;
                const place = places.get(key) || {
                    graph: graph.index,
                    site: loss.fusion.site,
                    source: loss.fusion.source,
                    count: 0,
                };
                place.count += policy.order.length ? 100 : 1;
                places.set(key, place);
            }
        }
    }
    const best = [...places.values()].reduce((most, place) => (!most || place.count > most.count ? place : most), null);
    if (!best) return null;
    const fusions = FUSIONS.filter((fusion) => fusion.graph === best.graph && fusion.site === best.site);
    const boxes = [...new Set(fusions.flatMap((fusion) => fusion.boxes))].sort((a, b) => a - b);
    const alike = new Set(
        FUSIONS.filter((each) => each.graph === best.graph && each.cls === fusions[0].cls).map((each) => each.site),
    );
    return { ...best, boxes, alike: alike.size };
});

/** The boxes of a contested place in order, those of one fusion in one frame; below, who went away with nothing. */
function contestStrip(contest, policy) {
    const applied = choiceOf(policy.index, STATE.range, contest.graph).applied.filter(
        ({ fusion }) => fusion.site === contest.site,
    );
    const lost = losersOf(policy.index, STATE.range, contest.graph).filter(
        ({ fusion }) => fusion.site === contest.site && !coveredBy(fusion, applied),
    );
    const parts = [];
    for (const index of contest.boxes) {
        const owner = applied.find(({ fusion }) => fusion.boxes.includes(index))?.fusion || null;
        if (owner && parts.at(-1)?.owner === owner) parts.at(-1).boxes.push(index);
        else parts.push({ owner, boxes: [index] });
    }
    const chip = (index) => el("span.chip", shortTitle(GRAPHS[contest.graph].boxes[index]));
    const strip = parts.map(({ owner, boxes }) =>
        owner
            ? el(
                  "span.frame",
                  { "data-rule": ruleHue(owner.rule), title: `${owner.rule} by ${owner.provider}` },
                  el("span.frame-chips", boxes.map(chip)),
                  el("span.frame-name", breakable(owner.rule)),
              )
            : boxes.map(chip),
    );
    const names = lost.map(({ fusion }) => el("span.loser", "✕ ", fusion.rule));
    return el("div.strip", el("div.strip-boxes", strip), names.length ? el("div.losers", names) : null);
}

/** Whether all that a loser would take is in one fusion anyway. */
const coveredBy = (fusion, applied) =>
    applied.some((each) => fusion.nodes.every((node) => each.fusion.nodes.includes(node)));
