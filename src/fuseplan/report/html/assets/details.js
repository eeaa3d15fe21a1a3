// The panel beside the page: all there is to know about what is selected.

function openDetails() {
    listen(["selection", "policy", "range", "size"], (changed) => {
        if (STATE.selection || changed.includes("selection")) drawDetails();
    });
    document.addEventListener("keydown", (event) => {
        if (event.key === "Escape" && STATE.selection && event.target.id !== "search") deselect();
    });
}

function drawDetails() {
    const panel = byId("details");
    const { selection } = STATE;
    const refocus = panel.contains(document.activeElement);
    panel.hidden = !selection;
    document.body.classList.toggle("with-details", Boolean(selection));
    if (!selection) return;
    const draw = { fusion: fusionDetails, box: boxDetails, conflict: conflictDetails, miss: missDetails }[
        selection.kind
    ];
    const { kind, title, parts } = draw(selection);
    refill(
        panel,
        el(
            "div.details-head",
            el("span.kind", kind),
            el("button.quiet", { "aria-label": "Close details", onclick: deselect }, "✕"),
        ),
        el("h2", { tabindex: "-1" }, title),
        parts,
    );
    if (refocus) panel.querySelector("h2").focus({ preventScroll: true });
    announce(`${kind}: ${panel.querySelector("h2").textContent}`);
}

/** A list of [name, value] with what isn't known left out. */
function facts(rows) {
    const known = rows.filter(([, value]) => value !== null && value !== undefined && value !== "" && value !== false);
    return el(
        "dl.facts-list",
        known.map(([name, value]) => [el("dt", name), el("dd", value)]),
    );
}

const part = (title, ...content) => (content.flat().some(Boolean) ? el("section", el("h3", title), content) : null);

function boxDetails({ graph, box: index }) {
    const box = GRAPHS[graph].boxes[index];
    const choice = choiceOf(STATE.policy, STATE.range, graph);
    const wanting = [
        ...choice.applied.map((each) => ({ state: "applied", ...each })),
        ...choice.lost.map((each) => ({ state: "lost", ...each })),
    ].filter(({ fusion }) => fusion.boxes.includes(index));
    const links = (indices) => list("ul.links", indices, (each) => boxLink(graph, each));
    return {
        kind: box.op ? "Dialect op" : "Other ops",
        title: code(box.op || box.title),
        parts: [
            facts([
                ["module", box.source && code(box.source)],
                ["line", box.line],
                ["value", box.value && code(box.value)],
                ["segment", segmentTitle(GRAPHS[graph].segments[box.segment])],
            ]),
            part(
                "Fusions that want it",
                list("ul.fates", wanting, (fate) => [fusionLink(fate.fusion), fateText(fate)]),
            ),
            part(
                "Near misses here",
                box.marks.map((miss) => el("p", missLink(miss, { graph, box: index }))),
            ),
            part("Calls in the original graph", counted(box.calls)),
            part("Reads", links(box.inputs)),
            part("Is read by", links(box.users)),
            part("Nodes", nodeNames(box.members)),
        ],
    };
}

function missLink(index, place) {
    const miss = VIEW.misses[index];
    const open = () => change({ selection: { kind: "miss", miss: index, ...place } });
    return el("button.link", { onclick: open }, nearGlyph(isFaint(miss)), ` ${miss.rule || miss.op}: ${miss.detail}`);
}

function conflictDetails({ policy: index, conflict }) {
    const policy = POLICIES[index];
    const row = policy.conflicts[conflict];
    const meets = (loss) =>
        loss.fusion.rule === row.loser &&
        loss.fusion.contested === row.op &&
        (row.winner === "unfused" ? !loss.winners.length : loss.winners.some((fusion) => fusion.rule === row.winner));
    const losses = GRAPHS.flatMap((graph) => losersOf(index, STATE.range, graph.index).filter(meets));
    const taker = row.winner === "unfused" ? "Inductor keeps" : [ruleName(row.winner), " takes"];
    const places = `${plural(row.count, "place")} under `;
    return {
        kind: "Conflict",
        title: [ruleName(row.loser), " loses"],
        parts: [
            el("p.sub", taker, " the ", code(row.op), ` in ${places}`, policyLabel(policy)),
            facts(conflictFacts(row, policy)),
            losses.length ? alternativesOf(losses[0].fusion.cls, losses[0].fusion, index) : null,
            part(`Places in range ${spanText(spanNow())}`, el("ul.fates", losses.map(placeOfLoss))),
        ],
    };
}

function conflictFacts(row, policy) {
    const lost = row.lost_us === null ? "can't be applied" : `${marginText(row.lost_us * 1000, 2)} a place`;
    const flips = row.flips_at_us === null ? null : `${number(row.flips_at_us, 2)} µs for its op`;
    return [
        ["with the loser", `${lost}${row.lost_us === null ? "" : ", mean over all ranges"}`],
        ["wins below", flips ? `${flips}, mean over all ranges` : `never: ${neverText(policy)}`],
        ["where", code(row.where)],
    ];
}

function placeOfLoss(loss) {
    const open = () => showFusion(loss.fusion);
    const text = loss.forbidden ? "forbidden" : marginText(loss.lost, 2);
    return el(
        "li",
        el("button.link", { onclick: open }, code(loss.fusion.source || loss.fusion.site)),
        el(loss.lost < 0 ? "span.figure.bad" : "span.figure", text),
    );
}

function missDetails({ miss: index, graph, box }) {
    const miss = VIEW.misses[index];
    const others = box === undefined ? [] : GRAPHS[graph].boxes[box].marks.filter((mark) => mark !== index);
    const drawn = miss.marks.filter((mark) => mark.box !== null);
    return {
        kind: `Near miss: ${miss.nearness}`,
        title: miss.rule ? ruleName(miss.rule) : code(miss.op || "–"),
        parts: [
            el("p.sub", NEARNESS[miss.nearness]),
            el("p.verdict", miss.detail),
            lineOfCode(miss),
            facts([
                ["expected", miss.expected && code(miss.expected)],
                ["found", miss.found && code(miss.found)],
                ["kind", miss.reason],
                ["provider", miss.provider],
                ["fix", miss.fix],
                ["places", number(miss.count)],
                ["in the way", miss.where && code(miss.where)],
                ["would be fused", miss.sites && code(miss.sites)],
                ["nodes", miss.nodes.length ? miss.nodes.map((node, at) => [at ? ", " : null, code(node)]) : null],
            ]),
            part(
                "Also in the way here",
                others.map((mark) => el("p", missLink(mark, { graph, box }))),
            ),
            part(
                "In the graph",
                list("ul.links", drawn, ({ graph, box, source }) =>
                    el(
                        "button.link",
                        { onclick: () => showInGraph(graph, box, { kind: "miss", miss: index, graph, box }) },
                        code(source || GRAPHS[graph].boxes[box].title),
                    ),
                ),
            ),
        ],
    };
}
