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
            null,
            el("span.kind", null, kind),
            el("button.quiet", { type: "button", "aria-label": "Close details", onclick: deselect }, "✕"),
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
        null,
        known.map(([name, value]) => [el("dt", null, name), el("dd", null, value)]),
    );
}

const part = (title, ...content) =>
    content.flat().some(Boolean) ? el("section", null, el("h3", null, title), content) : null;

function boxDetails({ graph, box: index }) {
    const box = GRAPHS[graph].boxes[index];
    const choice = choiceOf(STATE.policy, STATE.range, graph);
    const wanting = [
        ...choice.applied.map((each) => ({ state: "applied", ...each })),
        ...choice.lost.map((each) => ({ state: "lost", ...each })),
    ].filter(({ fusion }) => fusion.boxes.includes(index));
    const links = (indices) =>
        indices.length
            ? el(
                  "ul.links",
                  null,
                  indices.map((each) => el("li", null, boxLink(graph, each))),
              )
            : null;
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
                wanting.length
                    ? el(
                          "ul.fates",
                          null,
                          wanting.map((fate) => el("li", null, fusionLink(fate.fusion), fateText(fate))),
                      )
                    : null,
            ),
            part(
                "Near misses here",
                box.marks.map((miss) => el("p", null, missLink(miss, { graph, box: index }))),
            ),
            part(
                "Calls in the original graph",
                el(
                    "ul.counts",
                    null,
                    box.calls.map(([name, count]) => el("li", null, el("b", null, number(count)), " ", code(name))),
                ),
            ),
            part("Reads", links(box.inputs)),
            part("Is read by", links(box.users)),
            part(
                "Nodes",
                el(
                    "p.nodes",
                    null,
                    box.members.map((node) => code(node)),
                ),
            ),
        ],
    };
}

function missLink(index, place) {
    const miss = VIEW.misses[index];
    const open = () => change({ selection: { kind: "miss", miss: index, ...place } });
    return el(
        "button.link",
        { type: "button", onclick: open },
        nearGlyph(isFaint(miss)),
        ` ${miss.rule || miss.op}: ${miss.detail}`,
    );
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
            el("p.sub", null, taker, " the ", code(row.op), ` in ${places}`, policyLabel(policy)),
            facts(conflictFacts(row, policy)),
            losses.length ? alternativesOf(losses[0].fusion.cls, losses[0].fusion, index) : null,
            part(`Places in range ${spanText(spanNow())}`, el("ul.fates", null, losses.map(placeOfLoss))),
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
        null,
        el("button.link", { type: "button", onclick: open }, code(loss.fusion.source || loss.fusion.site)),
        el(loss.lost < 0 ? "span.figure.bad" : "span.figure", null, text),
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
            el("p.sub", null, NEARNESS[miss.nearness]),
            el("p.verdict", null, miss.detail),
            lineOfCode(miss),
            facts([
                ["expected", miss.expected && code(miss.expected)],
                ["found", miss.found && code(miss.found)],
                ["kind", miss.reason],
                ["provider", miss.provider],
                ["fix", miss.mend],
                ["places", number(miss.count)],
                ["in the way", miss.where && code(miss.where)],
                ["would be fused", miss.sites && code(miss.sites)],
                ["nodes", miss.nodes.length ? miss.nodes.map((node, at) => [at ? ", " : null, code(node)]) : null],
            ]),
            part(
                "Also in the way here",
                others.map((mark) => el("p", null, missLink(mark, { graph, box }))),
            ),
            part(
                "In the graph",
                drawn.length
                    ? el(
                          "ul.links",
                          null,
                          drawn.map((mark) =>
                              el(
                                  "li",
                                  null,
                                  el(
                                      "button.link",
                                      {
                                          type: "button",
                                          onclick: () =>
                                              showInGraph(mark.graph, mark.box, {
                                                  kind: "miss",
                                                  miss: index,
                                                  graph: mark.graph,
                                                  box: mark.box,
                                              }),
                                      },
                                      code(mark.source || GRAPHS[mark.graph].boxes[mark.box].title),
                                  ),
                              ),
                          ),
                      )
                    : null,
            ),
        ],
    };
}
